"""The paper's ablations as one command: it trains, evaluates and scores every row, and prints the differences.

    scienceqa   the tower's last layer, the answer first, no stage 1, a smaller model (section 5.2 of the paper)
    mixes       LLaVA-Bench or custom questions after four mixtures of instruction data, and after none (section 5.1)

Rows share stage 1 where they start from the same base. A row that is finished in --workdir is skipped; an interrupted
training run resumes.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax import config as configs
from llava_jax import errors, lifecycle
from llava_jax.data import scienceqa
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import answer, answers, judge, report
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import Benchmark, load_questions, resolve_options
from llava_jax.evaluate.score import Result
from llava_jax.generate.assistant import Assistant
from llava_jax.openai_client import options as server
from llava_jax.train import process

AnyPath = Path | epath.Path  # on a disk, or perhaps in a bucket
REASONS_FIRST, ANSWER_FIRST = "QCM-LEA", "QCM-ALE"
TYPES = ("conversation", "detail", "reasoning")


class Row(NamedTuple):
    """One line of a grid. base: which of the bases; mix: share of each of TYPES, None trains no stage 2 at all.

    paper: the published number. Source: arXiv 2304.08485, section 5 (ScienceQA in percent; relative scores).
    """

    name: str
    title: str
    paper: float
    base: str = "base"
    stage1: bool = True
    format: str = REASONS_FIRST
    mix: tuple[float, float, float] | None = (1.0, 1.0, 1.0)


GRIDS = {
    "scienceqa": (
        Row("best", "penultimate layer, reasons first, both stages", 90.92),
        Row("last_layer", "the tower's last layer", 89.96, base="last_layer"),
        Row("answer_first", "the answer first", 89.77, format=ANSWER_FIRST),
        Row("without_stage1", "no stage 1", 85.81, stage1=False),
        Row("small", "a smaller model", 89.84, base="small"),
    ),
    "mixes": (
        Row("full", "full data", 85.1),
        Row("detail_reasoning", "detail and reasoning", 81.9, mix=(0.0, 1.0, 1.0)),
        Row("conversation_5_10", "conversation, 5% of detail, 10% of reasoning", 80.5, mix=(1.0, 0.05, 0.10)),
        Row("conversation", "conversation", 73.8, mix=(1.0, 0.0, 0.0)),
        Row("none", "no instruction data", 21.5, mix=None),
    ),
}


@dataclass(frozen=True)
class Plan:
    """The inputs of a grid.

    bases: {"base", "last_layer", "small": checkpoint}; a row whose base is not there is left out.
    stage1, stage2: config files, with scalars to set in them. hand_off: "base", stage 2's model.base is stage 1;
    "start", its model.start is. records: of the instruction data at most, or None. scienceqa: ScienceQA's folder.
    instructions: a LLaVA JSON file for each of TYPES. images: of the pre-training data and the instructions.
    """

    workdir: Path
    bases: Mapping[str, AnyPath]
    stage1: Path
    stage2: Path
    pretrain: AnyPath
    images: AnyPath
    scienceqa: AnyPath | None = None
    instructions: tuple[AnyPath, ...] = ()
    stage1_set: tuple[str, ...] = ()
    stage2_set: tuple[str, ...] = ()
    hand_off: str = "base"
    records: int | None = None
    seed: int = 0


class TestSet(NamedTuple):
    """What every row answers. review: from the answer file to the file that `score` reads (a judge's reviews)."""

    benchmark: Benchmark
    data: AnyPath
    options: dict[str, str]
    settings: answer.Settings
    slots: int = 16
    template: str | None = None
    review: Callable[[Path], Path] = lambda path: path


class Preempted(Exception):
    """SIGTERM has stopped a training run, which is saved; `args[0]` is its directory."""


def run(plan: Plan, rows: Sequence[Row], test_set: TestSet) -> list[tuple[Row, Result]]:
    """Trains, evaluates and scores every row whose base exists.

    Raises:
      Preempted: by SIGTERM; the next call resumes.
    """
    start, results = time.monotonic(), []
    for row in rows:
        if row.base not in plan.bases:
            print(f"skips {row.name}: it needs --{row.base.replace('_', '-')}", flush=True)
            continue
        path = plan.workdir / row.name / "scores.json"
        if not path.exists():
            result = _evaluate(_train_row(plan, row, test_set, start), row, test_set, plan)
            scores.write(path, result, row.title)
        result = scores.from_json(path)[1]
        results.append((row, result))
        _log(start, f"{row.name}: {result.main} {result.numbers[result.main].mean:.2f}")
    return results


def table(results: Sequence[tuple[Row, Result]]) -> str:
    """A Markdown table: the rows with their differences from the first, and the paper's numbers and differences."""
    ours = report.differences([(row.title, result) for row, result in results], [results[0][1].main])
    best = results[0][0].paper
    lines = []
    for number, (line, row) in enumerate(zip(ours.splitlines()[2:], [row for row, _ in results])):
        change = f" ({row.paper - best:+.2f})" if number else ""
        lines.append([*(cell.strip() for cell in line.strip("|").split("|")), f"{row.paper:.2f}{change}"])
    return report.markdown(["", results[0][1].main, "paper"], lines)


def mixture(files: Sequence[AnyPath], shares: Sequence[float | int], seed: int, limit: int | None) -> list[Any]:
    """The records of each file's share: a prefix of a seeded permutation, so a larger share contains a smaller one.

    limit: the largest number of records in total, drawn by the same seed.
    """
    records: list[Any] = []
    for number, (file, share) in enumerate(zip(files, shares)):
        source = open_source(file)
        order = np.random.default_rng([seed, number]).permutation(len(source))
        records += [source[int(i)].raw for i in order[: round(share * len(source))]]
    return _limit(records, seed, limit)


def _limit(records: list[Any], seed: int, limit: int | None) -> list[Any]:
    if limit is None or limit >= len(records):
        return records
    order = np.random.default_rng([seed, len(TYPES)]).permutation(len(records))
    return [records[i] for i in sorted(order[:limit])]


def _train_row(plan: Plan, row: Row, test_set: TestSet, start: float) -> AnyPath:
    """Trains a row; the checkpoint to evaluate: stage 2, or stage 1 where there is no stage 2."""
    start_checkpoint = plan.bases[row.base]
    if row.stage1:
        start_checkpoint = plan.workdir / f"stage1_{row.base}"
        _log(start, f"stage 1 of {row.base}")
        settings = {"model.base": plan.bases[row.base], **_source(plan.pretrain, plan.images)}
        _train(plan.stage1, start_checkpoint, settings, plan.stage1_set)
    (plan.workdir / row.name).mkdir(parents=True, exist_ok=True)
    if row.mix is None:
        return start_checkpoint
    records, images = _records(plan, row, test_set)
    _log(start, f"stage 2 of {row.name}")
    workdir = plan.workdir / row.name / "stage2"
    hand_off = {
        "base": {"model.base": start_checkpoint},
        "start": {"model.base": plan.bases[row.base], "model.start": start_checkpoint},
    }[plan.hand_off]
    _train(plan.stage2, workdir, {**hand_off, **_source(records, images)}, plan.stage2_set)
    return workdir


def _records(plan: Plan, row: Row, test_set: TestSet) -> tuple[Path, AnyPath]:
    """Writes what a row's stage 2 reads; the file, and the folder of its pictures."""
    if plan.scienceqa is not None:
        problems = scienceqa.read(plan.scienceqa)
        train_problems = scienceqa.read_split(plan.scienceqa, "train", problems)
        records: list[Any] = [scienceqa.record(problem, row.format) for problem in train_problems]
        records, images = _limit(records, plan.seed, plan.records), plan.scienceqa / "images" / "train"
    else:
        assert row.mix is not None
        records, images = mixture(plan.instructions, row.mix, plan.seed, plan.records), plan.images
    if not records:
        raise DataError(f"{row.name}: no records are left of {row.mix} of {', '.join(map(str, plan.instructions))}")
    path = plan.workdir / row.name / "records.json"
    path.write_text(json.dumps(records))
    return path, images


def _source(records: AnyPath, images: AnyPath) -> dict[str, AnyPath]:
    return {"data.sources.0.path": records, "data.sources.0.images": images}


def _train(config: Path, workdir: Path, settings: dict[str, AnyPath], assignments: Sequence[str]) -> None:
    """Trains or resumes in this process; a base with another layer or size is no preset, so none is named."""
    overrides: dict[str, Any] = {"model.preset": "", **settings}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or key in overrides:
            raise UsageError(f"--stage1-set, --stage2-set: {assignment!r}: want KEY=VALUE, of a key not set yet")
        overrides[key] = text
    log = workdir.with_name(f"{workdir.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file),
        lifecycle.sigterm() as sigterm,
    ):  # fmt: skip
        code = process.run(configs.load(config, overrides), workdir, sigterm)
    if code != errors.DONE:
        raise Preempted(workdir)


def _evaluate(checkpoint: AnyPath, row: Row, test_set: TestSet, plan: Plan) -> Result:
    options = test_set.options | ({"format": row.format} if test_set.benchmark.name == "scienceqa" else {})
    questions, _ = load_questions(test_set.benchmark, test_set.data, options, images=True)
    # A stage 1 alone was trained on bare captions: it is prompted with the template of stage 2.
    template = test_set.template or ("v1" if row.mix is None else None)
    assistant = Assistant.open(checkpoint, test_set.slots, template=template)
    facts = {"weights": answer.weights_id(assistant), "template": assistant.format.template.name}
    path = plan.workdir / row.name / "answers.jsonl"
    respond = answer.from_checkpoint(assistant, test_set.settings, test_set.data / test_set.benchmark.images)
    run_id = answer.fingerprint(questions, test_set.settings, facts)
    answer.run(questions, respond, path, row.name, run_id, test_set.settings)
    return scores.score(test_set.benchmark, questions, [test_set.review(path)], options)


def _log(start: float, text: str) -> None:
    print(f"{time.monotonic() - start:5.0f} s {text}", flush=True)


# ---- the command


def main(args: argparse.Namespace) -> int:
    """Runs the grid of a command line; prints the table and writes WORKDIR/ablation.md. Returns the exit code."""
    plan, test_set = _plan(args), _test_set(args)
    try:
        results = run(plan, GRIDS[args.grid], test_set)
    except Preempted as stopped:
        print(f"evaluate: SIGTERM has stopped {stopped}, which is saved; the same command resumes it")
        return errors.PREEMPTED
    text = table(results)
    (plan.workdir / "ablation.md").write_text(text + "\n")
    print(text)
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    bases = {"base": args.base, "last_layer": args.last_layer, "small": args.small}
    files = tuple(vars(args)[name] for name in TYPES)
    return Plan(
        args.workdir, {name: path for name, path in bases.items() if path is not None}, args.stage1, args.stage2,
        args.pretrain, args.images, args.scienceqa if args.grid == "scienceqa" else None,
        files if args.grid == "mixes" else (), tuple(args.stage1_set), tuple(args.stage2_set), args.hand_off,
        args.records, args.seed,
    )  # fmt: skip


def _test_set(args: argparse.Namespace) -> TestSet:
    mixes = args.grid == "mixes"
    benchmark = get(args.benchmark if mixes else "scienceqa")
    options = resolve_options(benchmark, args.option)
    data = args.data if mixes else args.scienceqa
    settings = answer.Settings(args.max_new_tokens or benchmark.tokens)
    questions, _ = load_questions(benchmark, data, options, images=True)  # raises before anything is trained

    def review(path: Path) -> Path:
        out = path.with_name("reviews.jsonl")
        candidates = {row.id: row for row in answers.merge(questions, [path])}
        with server.open_client(args, args.cache or f"{out}.cache") as client:
            answers.write(out, judge.review(questions, candidates, rules, client, args.repeats))
        return out

    if not any("rule" in (question.facts or {}) for question in questions):
        return TestSet(benchmark, data, options, settings, args.slots, args.template)
    if args.rules is None or args.base_url is None or args.model is None:
        raise UsageError(f"--benchmark {benchmark.name} needs a judge: --rules, --base-url and --model")
    rules = judge.rules(args.rules, questions)
    return TestSet(benchmark, data, options, settings, args.slots, args.template, review)
