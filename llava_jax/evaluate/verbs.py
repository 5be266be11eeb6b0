"""The verbs that need no model: each reads files, calls one function of this package, and prints its result."""

import argparse
import sys
from collections.abc import Callable, Sequence

from llava_jax import errors
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import answers, ensemble, judge, report
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks.all import BENCHMARKS, get
from llava_jax.evaluate.questions import (
    Benchmark,
    Fault,
    Question,
    ReadResult,
    bad_benchmark,
    load_questions,
    resolve_options,
)  # fmt: skip
from llava_jax.openai_client import Client
from llava_jax.openai_client import options as server


def selection(options: argparse.Namespace) -> tuple[Benchmark, dict[str, str]]:
    """The benchmark of `--benchmark`, and all its options.

    Raises:
      UsageError: there is none of that name, or no such option.
    """
    benchmark = get(options.benchmark)
    return benchmark, resolve_options(benchmark, options.option)


def client(options: argparse.Namespace, cache: str) -> Client:
    """The client of the server; cache: the file of its answers where `--cache` names none."""
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
    questions, _ = _questions(options)
    merged = answers.merge(questions, options.answers)
    answers.write(options.out, merged)
    print(f"{len(merged):,} answers of {len(options.answers)} files in {options.out}")
    return 0


def _score(options: argparse.Namespace) -> int:
    benchmark, settings = selection(options)
    questions, _ = load_questions(benchmark, options.data, settings)
    if options.submission is not None:
        for path in scores.submission(
            benchmark, questions, options.answers, settings, options.data, options.submission
        ):  # fmt: skip
            print(f"wrote {path}")
        if any(question.truth is None for question in questions):
            return 0
    result = scores.score(benchmark, questions, options.answers, settings, options.allow_faults)
    print(scores.text(result))
    if options.out is not None:
        scores.write(options.out, result, options.name)
    return 0


def _judge(options: argparse.Namespace) -> int:
    benchmark, settings = selection(options)
    questions, _ = load_questions(benchmark, options.data, settings)
    if not all("rule" in (question.facts or {}) for question in questions):
        raise UsageError(f"--benchmark {benchmark.name}: a judge reviews LLaVA-Bench; `score` has the rule of this one")
    candidates, rules = _complete_answers(questions, options.answers), judge.rules(options.rules, questions)
    if options.dry_run:
        sys.stdout.write(judge.requests_text(questions, candidates, rules, options.system))
        return 0
    with client(options, f"{options.out}.cache") as reviewer:
        reviews = judge.review(questions, candidates, rules, reviewer, options.repeats, options.attempts,
                               options.system, options.temperature)  # fmt: skip
        print(reviewer.usage)
    answers.write(options.out, reviews)
    unanswered = [row for row in reviews if "fault" in row.metadata]
    for row in unanswered:
        print(f"  id={row.id!r} repeat {row.repeat} not_answered: {row.metadata['detail']}")
    print(f"{len(reviews) - len(unanswered):,} reviews in {options.out}: `score` reads them")
    return errors.DATA if unanswered else 0


def _ensemble(options: argparse.Namespace) -> int:
    options.benchmark = "scienceqa"
    questions, _ = _questions(options)
    ours, gpt4 = _complete_answers(questions, [options.ours]), _complete_answers(questions, [options.gpt4])
    if options.way == "complement":
        combined = ensemble.complement(questions, ours, gpt4)
    else:
        combined = ensemble.prefer_judge(questions, ours, _judge_answers(options, questions, ours, gpt4))
    answers.write(options.out, combined.answers)
    print(", ".join(f"{count:,} answers of {side}" for side, count in combined.counts.items()) + f" in {options.out}")
    return 0


def _judge_answers(
    options: argparse.Namespace, questions: Sequence[Question], ours: dict[str, Answer], gpt4: dict[str, Answer]
) -> dict[str, Answer]:
    """The judge's answers: those of a file, or requested now and written to OUT.requery."""
    if options.requery is not None:
        file = answers.read([options.requery])
        _, faults = answers.match(questions, file.answers)
        faults = [fault for fault in (*file.faults, *faults) if fault.kind not in ("missing_answer", "empty_answer")]
        if faults:
            raise bad_benchmark(options.requery, faults)
        replies: Sequence[Answer] = file.answers
    else:
        with client(options, f"{options.out}.cache") as reviewer:
            replies = ensemble.requery(questions, ours, gpt4, reviewer)
            print(reviewer.usage)
        answers.write(f"{options.out}.requery", replies)
        faults_of_server = [Fault("not_answered", row.id, row.metadata["detail"]) for row in replies if row.metadata]
        if faults_of_server:
            raise bad_benchmark(f"{options.out}.requery (the same command asks again)", faults_of_server)
    return {row.id: row for row in replies}


def _report(options: argparse.Namespace) -> int:
    for path in report.write(options.scores, options.out, options.plots):
        print(f"wrote {path}")
    return 0


def _complete_answers(questions: Sequence[Question], paths: Sequence[str]) -> dict[str, Answer]:
    """One answer to every question; an empty one is an answer."""
    merged = answers.merge(questions, paths)
    if any(row.repeat or "fault" in row.metadata for row in merged):
        raise DataError(f"{', '.join(paths)}: holds repeats, or questions that were not answered; want one answer each")
    return {row.id: row for row in merged}


def _questions(options: argparse.Namespace) -> ReadResult:
    benchmark, settings = selection(options)
    return load_questions(benchmark, options.data, settings)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list, "merge": _merge, "score": _score, "judge": _judge, "ensemble": _ensemble, "report": _report,
}  # fmt: skip
