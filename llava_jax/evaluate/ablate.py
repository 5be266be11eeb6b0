"""The paper's ablations as one command: every row is trained, asked and scored, and the differences are printed.

    scienceqa   the tower's last layer, the answer first, no stage 1, a smaller model (section 5.2 of the paper)
    mixes       LLaVA-Bench or own questions after four mixtures of instruction data, and after none (section 5.1)

Rows share stage 1 where they start from the same base. What is finished in --workdir is not done again; a training
that was stopped goes on.
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
from llava_jax.evaluate import answer, answers, judge, questions, report
from llava_jax.evaluate import score as scores
from llava_jax.evaluate.benchmarks.all import get
from llava_jax.evaluate.questions import Benchmark
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
    """What a grid is run on.

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


class Exam(NamedTuple):
    """What every row is asked. answered: from the answer file to the file that `score` reads (a judge's reviews)."""

    benchmark: Benchmark
    data: AnyPath
    options: dict[str, str]
    settings: answer.Settings
    slots: int = 16
    template: str | None = None
    answered: Callable[[Path], Path] = lambda path: path


class Stopped(Exception):
    """SIGTERM has stopped a training, which is saved; `args[0]` is its directory."""


def run(plan: Plan, rows: Sequence[Row], exam: Exam) -> list[tuple[Row, Result]]:
    """Trains, asks and scores every row whose base is there.

    Raises:
      Stopped: by SIGTERM; the next call goes on.
    """
    start, done = time.monotonic(), []
    for row in rows:
        if row.base not in plan.bases:
            print(f"leaves out {row.name}: it wants --{row.base.replace('_', '-')}", flush=True)
            continue
        numbers = plan.workdir / row.name / "scores.json"
        if not numbers.exists():
            result = _examined(_trained(plan, row, exam, start), row, exam, plan)
            scores.write(numbers, result, row.title)
        result = scores.from_json(numbers)[1]
        done.append((row, result))
        _say(start, f"{row.name}: {result.main} {result.numbers[result.main].mean:.2f}")
    return done


def table(done: Sequence[tuple[Row, Result]]) -> str:
    """The rows with their differences from the first, and the paper's own numbers and differences beside them."""
    ours = report.differences([(row.title, result) for row, result in done], [done[0][1].main])
    best = done[0][0].paper
    lines = []
    for place, (line, row) in enumerate(zip(ours.splitlines()[2:], [row for row, _ in done])):
        change = f" ({row.paper - best:+.2f})" if place else ""
        lines.append([*(cell.strip() for cell in line.strip("|").split("|")), f"{row.paper:.2f}{change}"])
    return report.markdown(["", done[0][1].main, "paper"], lines)


def mixture(files: Sequence[AnyPath], shares: Sequence[float | int], seed: int, limit: int | None) -> list[Any]:
    """The records of each file's share: a seeded permutation's beginning, so that a smaller share lies in a larger.

    limit: records in all at most, drawn by the same seed.
    """
    mixed: list[Any] = []
    for place, (file, share) in enumerate(zip(files, shares)):
        source = open_source(file)
        order = np.random.default_rng([seed, place]).permutation(len(source))
        mixed += [source[int(i)].raw for i in order[: round(share * len(source))]]
    return _limited(mixed, seed, limit)


def _limited(records: list[Any], seed: int, limit: int | None) -> list[Any]:
    if limit is None or limit >= len(records):
        return records
    order = np.random.default_rng([seed, len(TYPES)]).permutation(len(records))
    return [records[i] for i in sorted(order[:limit])]


def _trained(plan: Plan, row: Row, exam: Exam, start: float) -> AnyPath:
    """The checkpoint to examine: stage 2, or stage 1 where there is no stage 2."""
    first = plan.bases[row.base]
    if row.stage1:
        first = plan.workdir / f"stage1_{row.base}"
        _say(start, f"stage 1 of {row.base}")
        settings = {"model.base": plan.bases[row.base], **_source(plan.pretrain, plan.images)}
        _train(plan.stage1, first, settings, plan.stage1_set)
    (plan.workdir / row.name).mkdir(parents=True, exist_ok=True)
    if row.mix is None:
        return first
    records, images = _records(plan, row, exam)
    _say(start, f"stage 2 of {row.name}")
    place = plan.workdir / row.name / "stage2"
    hand_off = {"base": {"model.base": first},
                "start": {"model.base": plan.bases[row.base], "model.start": first}}[plan.hand_off]  # fmt: skip
    _train(plan.stage2, place, {**hand_off, **_source(records, images)}, plan.stage2_set)
    return place


def _records(plan: Plan, row: Row, exam: Exam) -> tuple[Path, AnyPath]:
    """Writes what a row's stage 2 reads; the file, and the folder of its pictures."""
    if plan.scienceqa is not None:
        problems = scienceqa.read(plan.scienceqa)
        chosen = scienceqa.read_split(plan.scienceqa, "train", problems)
        made: list[Any] = [scienceqa.record(problem, row.format) for problem in chosen]
        made, images = _limited(made, plan.seed, plan.records), plan.scienceqa / "images" / "train"
    else:
        assert row.mix is not None
        made, images = mixture(plan.instructions, row.mix, plan.seed, plan.records), plan.images
    if not made:
        raise DataError(f"{row.name}: no records are left of {row.mix} of {', '.join(map(str, plan.instructions))}")
    path = plan.workdir / row.name / "records.json"
    path.write_text(json.dumps(made))
    return path, images


def _source(records: AnyPath, images: AnyPath) -> dict[str, AnyPath]:
    return {"data.sources.0.path": records, "data.sources.0.images": images}


def _train(config: Path, workdir: Path, settings: dict[str, AnyPath], more: Sequence[str]) -> None:
    """Trains in this process, or goes on; a base with another layer or size is no preset, so none is named."""
    overrides: dict[str, Any] = {"model.preset": "", **settings}
    for word in more:
        key, equals, text = word.partition("=")
        if not equals or key in overrides:
            raise UsageError(f"--stage1-set, --stage2-set: {word!r}: want KEY=VALUE, of a key that is not set yet")
        overrides[key] = text
    log = workdir.with_name(f"{workdir.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file),
        lifecycle.sigterm() as sigterm,
    ):  # fmt: skip
        code = process.run(configs.load(config, overrides), workdir, sigterm)
    if code != errors.DONE:
        raise Stopped(workdir)


def _examined(checkpoint: AnyPath, row: Row, exam: Exam, plan: Plan) -> Result:
    options = exam.options | ({"format": row.format} if exam.benchmark.name == "scienceqa" else {})
    asked, _ = questions.load(exam.benchmark, exam.data, options, images=True)
    # A stage 1 alone was trained on bare captions: it is asked in the words of stage 2.
    template = exam.template or ("v1" if row.mix is None else None)
    assistant = Assistant.open(checkpoint, exam.slots, template=template)
    facts = {"weights": answer.weights_id(assistant), "template": assistant.format.template.name}
    path = plan.workdir / row.name / "answers.jsonl"
    respond = answer.from_checkpoint(assistant, exam.settings, exam.data / exam.benchmark.images)
    run_id = answer.fingerprint(asked, exam.settings, facts)
    answer.run(asked, respond, path, row.name, run_id, exam.settings)
    return scores.score(exam.benchmark, asked, [exam.answered(path)], options)


def _say(start: float, text: str) -> None:
    print(f"{time.monotonic() - start:5.0f} s {text}", flush=True)


# ---- the command


def main(told: argparse.Namespace) -> int:
    """Runs the grid of a command line; prints the table and leaves it in WORKDIR/ablation.md. Returns the exit code."""
    plan, exam = _plan(told), _exam(told)
    try:
        done = run(plan, GRIDS[told.grid], exam)
    except Stopped as stopped:
        print(f"evaluate: SIGTERM has stopped {stopped}, which is saved; the same command goes on from there")
        return errors.PREEMPTED
    shown = table(done)
    (plan.workdir / "ablation.md").write_text(shown + "\n")
    print(shown)
    return 0


def _plan(told: argparse.Namespace) -> Plan:
    bases = {"base": told.base, "last_layer": told.last_layer, "small": told.small}
    files = tuple(vars(told)[name] for name in TYPES)
    return Plan(
        told.workdir, {name: place for name, place in bases.items() if place is not None}, told.stage1, told.stage2,
        told.pretrain, told.images, told.scienceqa if told.grid == "scienceqa" else None,
        files if told.grid == "mixes" else (), tuple(told.stage1_set), tuple(told.stage2_set), told.hand_off,
        told.records, told.seed,
    )  # fmt: skip


def _exam(told: argparse.Namespace) -> Exam:
    mixes = told.grid == "mixes"
    benchmark = get(told.benchmark if mixes else "scienceqa")
    options = questions.resolved(benchmark, told.option)
    data = told.data if mixes else told.scienceqa
    settings = answer.Settings(told.max_new_tokens or benchmark.tokens)
    asked, _ = questions.load(benchmark, data, options, images=True)  # what it lacks is said before anything is trained

    def reviewed(path: Path) -> Path:
        out = path.with_name("reviews.jsonl")
        candidates = {one.id: one for one in answers.merge(asked, [path])}
        with server.open_client(told, told.cache or f"{out}.cache") as judging:
            answers.write(out, judge.review(asked, candidates, rules, judging, told.repeats))
        return out

    if not any("rule" in (question.facts or {}) for question in asked):
        return Exam(benchmark, data, options, settings, told.slots, told.template)
    if told.rules is None or told.base_url is None or told.model is None:
        raise UsageError(f"--benchmark {benchmark.name} wants a judge: --rules, --base-url and --model")
    rules = judge.rules(told.rules, asked)
    return Exam(benchmark, data, options, settings, told.slots, told.template, reviewed)
