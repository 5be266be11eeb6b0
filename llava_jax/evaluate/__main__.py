"""`python -m llava_jax.evaluate VERB`: benchmarks in two steps, answers and then numbers, with a file between.

list [NAME]     the benchmarks; of one, what it needs, from where, and its options
answer          a checkpoint's or an endpoint's answers -> answers.jsonl
merge           the shards of several hosts -> one file
judge           a language model reviews answers (LLaVA-Bench) -> reviews.jsonl, which `score` reads
ensemble        complement | judge: ScienceQA answered by two -> answers.jsonl
score           answers -> numbers; needs neither model nor accelerator
report          scores of several runs -> tables and plots
ablate          trains, answers and scores the paper's grid -> a table with differences
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from etils import epath

from llava_jax import cli, errors
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import ablate, answer, answers, ensemble, judge, questions, report
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmarks.all import BENCHMARKS, get
from llava_jax.evaluate.questions import Benchmark, Question
from llava_jax.generate.assistant import DTYPES, Assistant
from llava_jax.openai_client import Budget, Client, Endpoint
from llava_jax.prompt import templates


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code: 0 done, 64 usage, 65 data, 66 no usable checkpoint."""
    try:
        told = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or a usage error that has been said
        return int(stop.code or 0)
    return cli.run("evaluate", lambda: told.run(told), "stopped; the same command goes on from here")


def _list(told: argparse.Namespace) -> int:
    if told.name is None:
        for benchmark in BENCHMARKS.values():
            where = "scored here" if benchmark.score else "scored by its server"
            print(f"{benchmark.name:<17} {benchmark.title}; {where}")
        return 0
    benchmark = get(told.name)
    print(f"{benchmark.title}: --data DIR holds")
    for need in benchmark.needs:
        print(f"  {need.path:<44} from {need.source}" + (f" ({need.only})" if need.only else ""))
    for name, values in (benchmark.options or {}).items():
        print(f"  --option {name}={'|'.join(values)}")
    return 0


def _answer(told: argparse.Namespace) -> int:
    benchmark, options = _benchmark(told)
    shard = answer.shard(told.out, told.host, told.hosts)  # a wrong --host is said before anything is read
    asked, gone = questions.load(benchmark, told.data, options, images=True, allow_missing=told.allow_faults)
    settings = answer.Settings(
        told.max_new_tokens or benchmark.tokens, told.temperature, told.top_p, told.seed, told.two_pass, told.system,
        told.repeats,
    )  # fmt: skip
    folder = epath.Path(told.data) / benchmark.images
    if told.checkpoint is not None:
        assistant = Assistant.open(told.checkpoint, told.slots, told.dtype, told.step, told.template)
        speak = answer.from_checkpoint(assistant, settings, folder)
        facts = {"weights": answer.weights_id(assistant), "template": assistant.format.template.name}
        found = _spoken(told, asked, speak, facts, settings, gone, str(told.checkpoint))
    else:
        with _client(told, f"{shard}.cache") as client:
            speak = answer.from_endpoint(client, settings, folder)
            facts = {"endpoint": client.endpoint.base_url, "model": client.endpoint.model}
            found = _spoken(told, asked, speak, facts, settings, gone, client.endpoint.model)
            print(client.spent)
    faults = [one for one in found if "fault" in one.metadata]
    print(f"{len(found) - len(faults):,} answers, {len(faults):,} questions without one, in {shard}")
    for one in faults:
        print(f"  id={one.id!r} {one.metadata['fault']}: {one.metadata['detail']}")
    return errors.DATA if any(one.metadata["fault"] == "not_answered" for one in faults) else 0


def _spoken(
    told: argparse.Namespace, asked: Sequence[Question], speak: answer.Speaker, facts: dict[str, str],
    settings: answer.Settings, gone: Sequence[questions.Fault], model: str,
) -> tuple[Answer, ...]:  # fmt: skip
    run_id = answer.fingerprint(asked, settings, facts)
    name = told.name or model
    return answer.run(asked, speak, told.out, name, run_id, settings, told.host, told.hosts, gone)


def _merge(told: argparse.Namespace) -> int:
    asked, _ = questions.load(*_place(told))
    merged = answers.merge(asked, told.answers)
    answers.write(told.out, merged)
    print(f"{len(merged):,} answers of {len(told.answers)} files in {told.out}")
    return 0


def _score(told: argparse.Namespace) -> int:
    benchmark, options = _benchmark(told)
    asked, _ = questions.load(benchmark, told.data, options)
    if told.submission is not None:
        for path in scores.submission(benchmark, asked, told.answers, options, told.data, told.submission):
            print(f"wrote {path}")
        if any(question.truth is None for question in asked):
            return 0
    result = scores.score(benchmark, asked, told.answers, options, told.allow_faults)
    print(scores.text(result))
    if told.out is not None:
        epath.Path(told.out).write_text(json.dumps(scores.to_json(result, told.name), indent=1, ensure_ascii=False))
    return 0


def _judge(told: argparse.Namespace) -> int:
    benchmark, options = _benchmark(told)
    asked, _ = questions.load(benchmark, told.data, options)
    if not all("rule" in (question.facts or {}) for question in asked):
        raise UsageError(f"--benchmark {benchmark.name}: a judge reviews LLaVA-Bench; `score` has the rule of this one")
    candidates, rules = _whole(asked, told.answers), judge.rules(told.rules, asked)
    if told.dry_run:
        sys.stdout.write(judge.requests_text(asked, candidates, rules, told.system))
        return 0
    with _client(told, f"{told.out}.cache") as client:
        reviews = judge.review(asked, candidates, rules, client, told.repeats, told.attempts, told.system,
                               told.temperature)  # fmt: skip
        print(client.spent)
    answers.write(told.out, reviews)
    lost = [one for one in reviews if "fault" in one.metadata]
    for one in lost:
        print(f"  id={one.id!r} repeat {one.repeat} not_answered: {one.metadata['detail']}")
    print(f"{len(reviews) - len(lost):,} reviews in {told.out}: `score` reads them")
    return errors.DATA if lost else 0


def _ensemble(told: argparse.Namespace) -> int:
    told.benchmark = "scienceqa"
    asked, _ = questions.load(*_place(told))
    ours, gpt4 = _whole(asked, [told.ours]), _whole(asked, [told.gpt4])
    if told.way == "complement":
        joined = ensemble.complement(asked, ours, gpt4)
    else:
        joined = ensemble.judged(asked, ours, _requeried(told, asked, ours, gpt4))
    answers.write(told.out, joined.answers)
    print(", ".join(f"{count:,} answers of {side}" for side, count in joined.taken.items()) + f" in {told.out}")
    return 0


def _requeried(
    told: argparse.Namespace, asked: Sequence[Question], ours: dict[str, Answer], gpt4: dict[str, Answer]
) -> dict[str, Answer]:
    """The judge's answers: those of a file, or made now and kept beside the output."""
    if told.requery is not None:
        found = answers.read([told.requery])
        _, faults = answers.match(asked, found.answers)
        faults = [fault for fault in (*found.faults, *faults) if fault.kind not in ("missing_answer", "empty_answer")]
        if faults:
            raise questions.bad(told.requery, faults)
        made: Sequence[Answer] = found.answers
    else:
        with _client(told, f"{told.out}.cache") as client:
            made = ensemble.requery(asked, ours, gpt4, client)
            print(client.spent)
        answers.write(f"{told.out}.requery", made)
        lost = [questions.Fault("not_answered", one.id, one.metadata["detail"]) for one in made if one.metadata]
        if lost:
            raise questions.bad(f"{told.out}.requery (the same command asks again)", lost)
    return {one.id: one for one in made}


def _report(told: argparse.Namespace) -> int:
    for path in report.write(told.scores, told.out, told.plots):
        print(f"wrote {path}")
    return 0


def _ablate(told: argparse.Namespace) -> int:
    return ablate.main(told, _client)


def _whole(asked: Sequence[Question], paths: Sequence[str]) -> dict[str, Answer]:
    """One answer to every question; an empty one is an answer."""
    merged = answers.merge(asked, paths)
    if any(one.repeat or "fault" in one.metadata for one in merged):
        raise DataError(f"{', '.join(paths)}: holds repeats, or questions that were not answered; want one answer each")
    return {one.id: one for one in merged}


def _benchmark(told: argparse.Namespace) -> tuple[Benchmark, dict[str, str]]:
    benchmark = get(told.benchmark)
    return benchmark, questions.resolved(benchmark, told.option)


def _place(told: argparse.Namespace) -> tuple[Benchmark, str, dict[str, str]]:
    benchmark, options = _benchmark(told)
    return benchmark, told.data, options


def _client(told: argparse.Namespace, cache: str) -> Client:
    if told.base_url is None or told.model is None:
        raise UsageError("want --base-url and --model of an OpenAI-compatible server")
    endpoint = Endpoint(told.base_url, told.model, concurrency=told.concurrency)
    budget = Budget(told.max_tokens_spent, told.max_usd, told.usd_per_million_in, told.usd_per_million_out)
    path = epath.Path(told.cache or cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    return Client(endpoint, path, budget)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.evaluate", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=cli.Parser)
    add = _adder(verbs)
    add("list", _list, "the benchmarks, or what one of them needs").add_argument("name", nargs="?", metavar="NAME")
    _answer_options(add("answer", _answer, "answers of a checkpoint or an endpoint"))
    merge = _benchmark_options(add("merge", _merge, "the shards of several hosts into one file"))
    merge.add_argument("answers", nargs="+", metavar="SHARD")
    merge.add_argument("--out", required=True, metavar="FILE")
    score = _benchmark_options(add("score", _score, "numbers for answers"))
    score.add_argument("answers", nargs="+", metavar="ANSWERS", help="an answer file, or all shards of one")
    score.add_argument("--allow-faults", action="store_true", help="count what the files lack as wrong, and name it")
    score.add_argument("--submission", metavar="DIR", help="write the files that the benchmark's server wants")
    score.add_argument("--out", metavar="FILE", help="the numbers as JSON, for `report`")
    score.add_argument("--name", default="", help="what `report` calls this run; default: the model")
    _judge_options(add("judge", _judge, "reviews of LLaVA-Bench answers by a language model"))
    _ensemble_options(add("ensemble", _ensemble, "ScienceQA by two: complement or judge"))
    grids = add("ablate", _ablate, "train, ask and score the paper's grid")
    ablate.add_options(grids)
    _endpoint_options(grids)
    reports = add("report", _report, "tables and plots from several runs")
    reports.add_argument("scores", nargs="+", metavar="SCORES", help="files of `score --out`")
    reports.add_argument("--out", required=True, metavar="DIR")
    reports.add_argument("--plots", choices=("png", "svg", "none"), default="none", help="others want matplotlib")
    return parser


def _adder(verbs: argparse._SubParsersAction) -> Callable[..., argparse.ArgumentParser]:
    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.set_defaults(run=run)
        return verb

    return add


def _benchmark_options(verb: argparse.ArgumentParser, named: bool = True) -> argparse.ArgumentParser:
    if named:
        verb.add_argument("--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    verb.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files; see `list NAME`")
    verb.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="see `list NAME`")
    return verb


def _answer_options(verb: argparse.ArgumentParser) -> None:
    _benchmark_options(verb)
    verb.add_argument("--checkpoint", metavar="DIR", help="what `train` or `convert` wrote; or --base-url")
    verb.add_argument("--step", type=int, help="of the checkpoint; default: the latest")
    verb.add_argument("--slots", type=int, default=16, help="questions answered at once; no answer depends on it")
    verb.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 elsewhere")
    verb.add_argument("--template", choices=list(templates.TEMPLATES), help="default: the checkpoint's own")
    _endpoint_options(verb)
    verb.add_argument(
        "--out", required=True, metavar="FILE", help="answers.jsonl, on a disk that can append; a shard adds its number"
    )
    verb.add_argument("--name", default="", help="model_id of the answers; default: the checkpoint or model")
    verb.add_argument("--max-new-tokens", type=int, help="default: the benchmark's own")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--repeats", type=int, default=1, help="answers to each question; `score` gives mean and sd")
    verb.add_argument("--two-pass", action="store_true", help="reasons first, then the answer (ScienceQA's LEPA)")
    verb.add_argument("--system", help="replaces the template's system text")
    verb.add_argument("--host", type=int, default=0, metavar="I", help="answer share I of --hosts, from 0")
    verb.add_argument("--hosts", type=int, default=1, metavar="N")
    verb.add_argument("--allow-faults", action="store_true", help="go on without the pictures that are missing")


def _judge_options(verb: argparse.ArgumentParser) -> None:
    _benchmark_options(verb)
    verb.add_argument("--answers", nargs="+", required=True, metavar="FILE", help="the candidate's")
    verb.add_argument("--rules", required=True, metavar="FILE", help="of the shape of LLaVA's rule.json")
    _endpoint_options(verb)
    verb.add_argument("--repeats", type=int, default=1, help="reviews of each answer; the paper's daggered rows have 3")
    verb.add_argument("--attempts", type=int, default=3, help="for a review with two scores")
    verb.add_argument("--temperature", type=float, default=judge.TEMPERATURE)
    verb.add_argument("--system", default=judge.SYSTEM, help="the judge's system message")
    verb.add_argument("--dry-run", action="store_true", help="print the requests, ask nobody")
    verb.add_argument("--out", required=True, metavar="FILE", help="reviews.jsonl")


def _ensemble_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("way", choices=("complement", "judge"))
    _benchmark_options(verb, named=False)
    verb.add_argument("--ours", required=True, metavar="FILE", help="LLaVA's answers")
    verb.add_argument("--gpt4", required=True, metavar="FILE", help="the other's")
    verb.add_argument("--requery", metavar="FILE", help="the judge's answers, if they are there already")
    _endpoint_options(verb)
    verb.add_argument("--out", required=True, metavar="FILE")


def _endpoint_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server; its key is in $OPENAI_API_KEY")
    verb.add_argument("--model", help="the server's model")
    verb.add_argument("--concurrency", type=int, default=8, help="requests at once")
    verb.add_argument("--cache", metavar="FILE", help="default: beside --out")
    verb.add_argument("--max-tokens-spent", type=int, metavar="N", help="ask no more after so many tokens")
    verb.add_argument("--max-usd", type=float, help="ask no more after so much money; wants both prices")
    verb.add_argument("--usd-per-million-in", type=float, default=0.0, metavar="USD")
    verb.add_argument("--usd-per-million-out", type=float, default=0.0, metavar="USD")


if __name__ == "__main__":
    sys.exit(main())
