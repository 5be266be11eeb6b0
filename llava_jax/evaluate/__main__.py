"""`python -m llava_jax.evaluate VERB`: benchmarks in two steps, answers and then numbers, with a file between.

list [NAME]     the benchmarks; of one, what it needs, from where, and its options
answer          a checkpoint's or an endpoint's answers -> answers.jsonl
merge           the shards of several hosts -> one file
judge           a language model reviews answers (LLaVA-Bench) -> reviews.jsonl, which `score` reads
ensemble        complement | judge: ScienceQA answered by two -> answers.jsonl
score           answers -> numbers; needs neither model nor accelerator
report          scores of several runs -> tables (Markdown, CSV, LaTeX) and plots
ablate          trains, answers and scores the paper's grid -> a table with differences
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from etils import epath

from llava_jax import cli, files
from llava_jax.errors import UsageError
from llava_jax.evaluate import judge, verbs
from llava_jax.evaluate.benchmarks.all import BENCHMARKS
from llava_jax.openai_client import options as server
from llava_jax.prompt import templates

# Repeated here, since their modules import jax, which would delay a usage error.
DTYPES = ("float32", "bfloat16")
GRIDS = ("scienceqa", "mixes")
TYPES = ("conversation", "detail", "reasoning")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code: 0 done, 64 usage, 65 data, 66 no usable checkpoint."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or a usage error that is printed
        return int(stop.code or 0)
    return cli.run("evaluate", lambda: _run(options), "interrupted; the same command resumes")


def _run(options: argparse.Namespace) -> int:
    """Runs the verb; the modules that bring jax are imported here, after what is quick to refuse."""
    asks_server = vars(options).get("base_url") is not None
    if asks_server and "out" in options:
        files.want_disk(options.cache or options.out, "--cache", "it is locked and grows (--cache FILE names another)")
    if options.verb == "answer":
        verbs.selection(options)
        if (options.checkpoint is None) == (options.base_url is None):
            raise UsageError("answer: want either --checkpoint DIR, or --base-url URL with --model NAME")
        from llava_jax.evaluate import ask

        return ask.run(options)
    if options.verb == "ablate":
        _check_grid(options)
        cli.show_progress()
        from llava_jax.evaluate import ablate

        return ablate.main(options)
    return verbs.VERBS[options.verb](options)


def _check_grid(options: argparse.Namespace) -> None:
    """Raises UsageError where the grid lacks its data."""
    if options.grid == "scienceqa" and options.scienceqa is None:
        raise UsageError("grid scienceqa needs --scienceqa DIR")
    required = (*TYPES, "benchmark", "data")
    if options.grid == "mixes" and None in [vars(options)[name] for name in required]:
        raise UsageError(f"grid mixes needs {', '.join(f'--{name}' for name in required)}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.evaluate", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return subparsers.add_parser(name, help=text, description=text)

    with_benchmark = add("list", "the benchmarks, or what one of them needs").add_mutually_exclusive_group()
    with_benchmark.add_argument("name", nargs="?", metavar="NAME")
    with_benchmark.add_argument("--benchmark", metavar="NAME", help="the same")
    _answer_options(add("answer", "answers of a checkpoint or an endpoint"))
    merge = _benchmark_options(add("merge", "the shards of several hosts into one file"))
    merge.add_argument("answers", nargs="+", metavar="SHARD")
    merge.add_argument("--out", required=True, metavar="FILE")
    _score_options(add("score", "numbers for answers"))
    _judge_options(add("judge", "reviews of LLaVA-Bench answers by a language model"))
    _ensemble_options(add("ensemble", "ScienceQA by two: complement or judge"))
    _ablate_options(add("ablate", "train, evaluate and score the paper's grid"))
    report = add("report", "tables and plots of several runs")
    report.add_argument("scores", nargs="+", metavar="SCORES", help="files of `score --out`")
    report.add_argument("--out", required=True, metavar="DIR", help="for report.md, report.csv, report.tex and plots")
    report.add_argument("--plots", choices=("png", "svg", "none"), default="none", help="others need matplotlib")
    return parser


def _benchmark_options(verb: argparse.ArgumentParser, with_benchmark: bool = True) -> argparse.ArgumentParser:
    if with_benchmark:
        verb.add_argument("--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    verb.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files; see `list NAME`")
    verb.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="see `list NAME`")
    return verb


def _answer_options(verb: argparse.ArgumentParser) -> None:
    _benchmark_options(verb)
    verb.add_argument("--checkpoint", metavar="DIR", help="what `train` or `convert` wrote; or --base-url")
    verb.add_argument("--step", type=cli.step, metavar="N", help="of the checkpoint, or best; default: the latest")
    verb.add_argument("--slots", type=int, default=16, help="questions answered at once by all devices together; no "
                      "answer depends on it")
    verb.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    text = "the language model's matrices in int8, on TPUs and GPUs; default: --dtype"
    verb.add_argument("--weights", choices=("int8",), help=text)
    verb.add_argument("--template", choices=list(templates.TEMPLATES), help="default: the checkpoint's own")
    _endpoint_options(verb)
    verb.add_argument(
        "--out", required=True, metavar="FILE", help="answers.jsonl; a shard adds its number"
    )
    verb.add_argument("--name", default="", help="model_id of the answers; default: the checkpoint or model")
    verb.add_argument("--max-new-tokens", type=int, help="default: the benchmark's own")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--repetition-penalty", type=float, default=1.0, help="of a checkpoint; above 1: tokens of "
                      "prompt and answer are less likely; 1: off")  # fmt: skip
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--repeats", type=int, default=1, help="answers to each question; `score` gives mean and sd")
    verb.add_argument("--two-pass", action="store_true", help="reasons first, then the answer (ScienceQA's LEPA)")
    verb.add_argument("--system", help="replaces the template's system text")
    verb.add_argument("--host", type=int, default=0, metavar="I", help="answer share I of --hosts, from 0; the "
                      "processes of one job (LLAVA_JAX_MULTIHOST=1) share the questions without, and write one file")
    verb.add_argument("--hosts", type=int, default=1, metavar="N")
    verb.add_argument("--allow-faults", action="store_true", help="answer without the pictures that are missing")


def _score_options(verb: argparse.ArgumentParser) -> None:
    _benchmark_options(verb)
    verb.add_argument("answers", nargs="+", metavar="ANSWERS", help="an answer file, or all shards of one")
    verb.add_argument("--allow-faults", action="store_true", help="score without what the files lack, and name it")
    verb.add_argument("--submission", metavar="DIR", help="write the files for the benchmark's server")
    verb.add_argument("--out", metavar="FILE", help="the numbers as JSON, for `report`")
    verb.add_argument("--name", default="", help="what `report` calls this run; default: the model")


def _judge_options(verb: argparse.ArgumentParser) -> None:
    _benchmark_options(verb)
    verb.add_argument("--answers", nargs="+", required=True, metavar="FILE", help="the candidate's")
    verb.add_argument("--rules", required=True, metavar="FILE", help="of the shape of LLaVA's rule.json")
    _endpoint_options(verb)
    verb.add_argument("--repeats", type=int, default=1, help="reviews of each answer; the paper's daggered rows have 3")
    verb.add_argument("--attempts", type=int, default=3, help="for a review with two scores")
    verb.add_argument("--temperature", type=float, default=judge.TEMPERATURE)
    verb.add_argument("--system", default=judge.SYSTEM, help="the judge's system message")
    verb.add_argument("--dry-run", action="store_true", help="print the requests, send none")
    verb.add_argument("--out", required=True, metavar="FILE", help="reviews.jsonl")


def _ensemble_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("way", choices=("complement", "judge"))
    _benchmark_options(verb, with_benchmark=False)
    verb.add_argument("--ours", required=True, metavar="FILE", help="LLaVA's answers")
    verb.add_argument("--gpt4", required=True, metavar="FILE", help="the other's")
    verb.add_argument("--requery", metavar="FILE", help="the judge's answers, if they are there already")
    _endpoint_options(verb)
    verb.add_argument("--out", required=True, metavar="FILE")


def _ablate_options(verb: argparse.ArgumentParser) -> None:
    add: Callable[..., argparse.Action] = verb.add_argument
    add("grid", choices=GRIDS)
    add("--workdir", required=True, type=cli.on_disk)
    add("--base", required=True, type=epath.Path, metavar="DIR", help="checkpoint before stage 1 (`convert assemble`)")
    add("--last-layer", type=epath.Path, metavar="DIR", help="the same with --select-layer -1")
    add("--small", type=epath.Path, metavar="DIR", help="of a smaller model")
    add("--stage1", required=True, type=cli.on_disk, metavar="CONFIG")
    add("--stage2", required=True, type=cli.on_disk, metavar="CONFIG")
    add("--stage1-set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=10")
    add("--stage2-set", action="append", default=[], metavar="KEY=VALUE")
    add("--hand-off", choices=("base", "start"), default="base",
        help="the key of stage 2's config that names stage 1's checkpoint: model.base or model.start")  # fmt: skip
    add("--pretrain", required=True, type=epath.Path, metavar="JSON", help="stage 1's records")
    add("--images", required=True, type=epath.Path, metavar="DIR", help="pictures of stage 1 and of the instructions")
    add("--scienceqa", type=epath.Path, metavar="DIR", help="grid scienceqa: problems.json, pid_splits.json, images/")
    for name in TYPES:
        add(f"--{name}", type=epath.Path, metavar="JSON", help="grid mixes: instruction data of this type")
    add("--benchmark", metavar="NAME", help="grid mixes: the test set of every row")
    add("--data", type=epath.Path, metavar="DIR", help="grid mixes: the benchmark's files")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the benchmark")
    add("--records", type=int, metavar="N", help="the most records of the instruction data; default: all")
    add("--max-new-tokens", type=int, help="default: the benchmark's own")
    add("--slots", type=int, default=16, help="questions answered at once")
    add("--template", choices=list(templates.TEMPLATES), help="default: each checkpoint's own")
    add("--seed", type=int, default=0, help="of the mixtures")
    add("--rules", metavar="FILE", help="for LLaVA-Bench: the judge's rules; and --base-url, --model")
    add("--repeats", type=int, default=1, help="reviews of each answer")
    _endpoint_options(verb)


def _endpoint_options(verb: argparse.ArgumentParser) -> None:
    server.add(verb, required=False)
    verb.add_argument("--cache", metavar="FILE", help="the server's answers, so none is paid for twice; "
                      "default: OUT.cache")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
