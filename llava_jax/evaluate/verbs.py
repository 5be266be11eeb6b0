"""The verbs that need no model: each reads files, calls one function of this package, and prints what came of it."""

import argparse
import sys
from collections.abc import Callable, Sequence

from llava_jax import errors
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import answers, ensemble, judge, questions, report
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks.all import BENCHMARKS, get
from llava_jax.evaluate.questions import Benchmark, Question
from llava_jax.openai_client import Client
from llava_jax.openai_client import options as server


def chosen(options: argparse.Namespace) -> tuple[Benchmark, dict[str, str]]:
    """The benchmark of `--benchmark`, and all its options.

    Raises:
      UsageError: there is none of that name, or no such option.
    """
    benchmark = get(options.benchmark)
    return benchmark, questions.resolved(benchmark, options.option)


def client(options: argparse.Namespace, cache: str) -> Client:
    """The server that is asked; cache: the file of its answers where `--cache` names none."""
    return server.open_client(options, options.cache or cache)


def _list(options: argparse.Namespace) -> int:
    name = options.name or options.benchmark
    if name is None:
        for benchmark in BENCHMARKS.values():
            where = "scored here" if benchmark.score else "scored by its server"
            print(f"{benchmark.name:<17} {benchmark.title}; {where}")
        return 0
    benchmark = get(name)
    print(f"{benchmark.title}: --data DIR holds")
    for need in benchmark.needs:
        print(f"  {need.path:<44} from {need.source}" + (f" ({need.only})" if need.only else ""))
    for name, values in (benchmark.options or {}).items():
        print(f"  --option {name}={'|'.join(filter(None, values))}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    asked, _ = _questions(options)
    merged = answers.merge(asked, options.answers)
    answers.write(options.out, merged)
    print(f"{len(merged):,} answers of {len(options.answers)} files in {options.out}")
    return 0


def _score(options: argparse.Namespace) -> int:
    benchmark, settings = chosen(options)
    asked, _ = questions.load(benchmark, options.data, settings)
    if options.submission is not None:
        for path in scores.submission(
            benchmark, asked, options.answers, settings, options.data, options.submission
        ):  # fmt: skip
            print(f"wrote {path}")
        if any(question.truth is None for question in asked):
            return 0
    result = scores.score(benchmark, asked, options.answers, settings, options.allow_faults)
    print(scores.text(result))
    if options.out is not None:
        scores.write(options.out, result, options.name)
    return 0


def _judge(options: argparse.Namespace) -> int:
    benchmark, settings = chosen(options)
    asked, _ = questions.load(benchmark, options.data, settings)
    if not all("rule" in (question.facts or {}) for question in asked):
        raise UsageError(f"--benchmark {benchmark.name}: a judge reviews LLaVA-Bench; `score` has the rule of this one")
    candidates, rules = _whole(asked, options.answers), judge.rules(options.rules, asked)
    if options.dry_run:
        sys.stdout.write(judge.requests_text(asked, candidates, rules, options.system))
        return 0
    with client(options, f"{options.out}.cache") as reviewer:
        reviews = judge.review(asked, candidates, rules, reviewer, options.repeats, options.attempts, options.system,
                               options.temperature)  # fmt: skip
        print(reviewer.spent)
    answers.write(options.out, reviews)
    lost = [one for one in reviews if "fault" in one.metadata]
    for one in lost:
        print(f"  id={one.id!r} repeat {one.repeat} not_answered: {one.metadata['detail']}")
    print(f"{len(reviews) - len(lost):,} reviews in {options.out}: `score` reads them")
    return errors.DATA if lost else 0


def _ensemble(options: argparse.Namespace) -> int:
    options.benchmark = "scienceqa"
    asked, _ = _questions(options)
    ours, gpt4 = _whole(asked, [options.ours]), _whole(asked, [options.gpt4])
    if options.way == "complement":
        joined = ensemble.complement(asked, ours, gpt4)
    else:
        joined = ensemble.judged(asked, ours, _requeried(options, asked, ours, gpt4))
    answers.write(options.out, joined.answers)
    print(", ".join(f"{count:,} answers of {side}" for side, count in joined.taken.items()) + f" in {options.out}")
    return 0


def _requeried(
    options: argparse.Namespace, asked: Sequence[Question], ours: dict[str, Answer], gpt4: dict[str, Answer]
) -> dict[str, Answer]:
    """The judge's answers: those of a file, or made now and kept beside the output."""
    if options.requery is not None:
        read = answers.read([options.requery])
        _, faults = answers.match(asked, read.answers)
        faults = [fault for fault in (*read.faults, *faults) if fault.kind not in ("missing_answer", "empty_answer")]
        if faults:
            raise questions.bad(options.requery, faults)
        replies: Sequence[Answer] = read.answers
    else:
        with client(options, f"{options.out}.cache") as reviewer:
            replies = ensemble.requery(asked, ours, gpt4, reviewer)
            print(reviewer.spent)
        answers.write(f"{options.out}.requery", replies)
        lost = [questions.Fault("not_answered", one.id, one.metadata["detail"]) for one in replies if one.metadata]
        if lost:
            raise questions.bad(f"{options.out}.requery (the same command asks again)", lost)
    return {one.id: one for one in replies}


def _report(options: argparse.Namespace) -> int:
    for path in report.write(options.scores, options.out, options.plots):
        print(f"wrote {path}")
    return 0


def _whole(asked: Sequence[Question], paths: Sequence[str]) -> dict[str, Answer]:
    """One answer to every question; an empty one is an answer."""
    merged = answers.merge(asked, paths)
    if any(one.repeat or "fault" in one.metadata for one in merged):
        raise DataError(f"{', '.join(paths)}: holds repeats, or questions that were not answered; want one answer each")
    return {one.id: one for one in merged}


def _questions(options: argparse.Namespace) -> questions.Read:
    benchmark, settings = chosen(options)
    return questions.load(benchmark, options.data, settings)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list, "merge": _merge, "score": _score, "judge": _judge, "ensemble": _ensemble, "report": _report,
}  # fmt: skip
