"""Answers in, numbers out: no model, no accelerator, and nothing that is counted as wrong without being named.

Two policies meet here. Faults of files (a truncated line, an id twice, a question without an answer, a picture that
was missing) stop the scoring, each named by its id, until they are mended or allowed; allowed, they count as wrong.
Failings of the model (an empty answer, a letter that is no choice, a text without an answer) are what a benchmark
measures: its official rule counts them, and each is listed.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import answers
from llava_jax.evaluate.questions import FAULTS, Benchmark, Fault, Options, Question, Score


class Value(NamedTuple):
    """A number of one column: the mean over repeats, and their sample standard deviation (0.0 for one repeat)."""

    mean: float
    sd: float


class Result(NamedTuple):
    """Numbers of one run of one benchmark. findings: faults that were allowed and failings of the model.

    counts: of the first repeat.
    """

    benchmark: str
    title: str
    model: str
    options: dict[str, str]
    questions: int
    repeats: int
    numbers: dict[str, Value]
    main: str
    counts: dict[str, int]
    findings: tuple[Fault, ...]


def score(
    benchmark: Benchmark, questions: Sequence[Question], paths: Sequence[epath.PathLike], options: Options,
    allow_faults: bool = False,
) -> Result:  # fmt: skip
    """The benchmark's numbers for the answers of one file, or of several shards.

    Raises:
      DataError: the files have faults and `allow_faults` is not set (names every one), or hold no answer at all.
      ValueError: the benchmark's truth is with its server, which wants the files of `submission`.
    """
    if benchmark.score is None or any(question.truth is None for question in questions):
        raise UsageError(f"{benchmark.name}: not all of its answers are public (options {dict(options)}): "
                         "--submission DIR writes what its server wants")  # fmt: skip
    found = answers.read(paths)
    by_repeat, unfit = answers.match(questions, found.answers)
    faults = [*found.faults, *unfit]
    refused = [fault for fault in faults if FAULTS[fault.kind][0]]
    where = ", ".join(map(str, paths))
    if refused and not allow_faults:
        raise DataError("\n".join([
            f"{where}: {len(refused)} faults, so no score; mend them, or count them as wrong with --allow-faults:",
            *(f"  {fault}" for fault in refused),
        ]))  # fmt: skip
    if not by_repeat:
        raise DataError(f"{where}: no answer to any of the {len(questions)} questions of {benchmark.name}")
    scores = [benchmark.score(questions, given, options) for given in by_repeat.values()]
    models = sorted({answer.model for answer in found.answers})
    return Result(
        benchmark.name, benchmark.title, ", ".join(models), dict(options), len(questions), len(scores), _values(scores),
        scores[0].main, scores[0].counts, (*faults, *(finding for one in scores for finding in one.findings)),
    )  # fmt: skip


def submission(
    benchmark: Benchmark, questions: Sequence[Question], paths: Sequence[epath.PathLike], options: Options,
    data: epath.PathLike, directory: epath.PathLike,
) -> tuple[str, ...]:  # fmt: skip
    """Writes the files that the benchmark's server wants into `directory`; their paths. data: the benchmark's files.

    Raises:
      DataError: a question has no answer or several, or a line is broken; names each. ValueError: it has no server.
    """
    if benchmark.submit is None:
        raise UsageError(f"{benchmark.name} has no submission file: `score` computes its numbers here")
    merged = answers.merge(questions, paths)
    if any(answer.repeat for answer in merged):
        raise UsageError(f"{', '.join(map(str, paths))}: holds repeats; a server wants one answer to a question")
    place = epath.Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    files = benchmark.submit(epath.Path(data), questions, {answer.id: answer.text for answer in merged}, options)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return tuple(str(place / name) for name in files)


def to_json(result: Result, run: str = "") -> dict[str, Any]:
    """The result as a JSON object, for `report`; run: what to call it there."""
    numbers = {name: {"mean": value.mean, "sd": value.sd} for name, value in result.numbers.items()}
    findings = [finding._asdict() for finding in result.findings]
    return {"run": run or result.model, **result._asdict(), "numbers": numbers, "findings": findings}


def from_json(path: epath.PathLike) -> tuple[str, Result]:
    """(run, result) of a file that `to_json` filled.

    Raises:
      DataError: it is no such file.
    """
    try:
        told = json.loads(epath.Path(path).read_text(encoding="utf-8"))
        run = told.pop("run")
        told["numbers"] = {name: Value(**value) for name, value in told["numbers"].items()}
        told["findings"] = tuple(Fault(**finding) for finding in told["findings"])
        return run, Result(**told)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path}: not a file that `score --out` wrote: {type(error).__name__}: {error}") from None


def text(result: Result, shown: int = 20) -> str:
    """The result for a terminal: columns, counts of findings, and the first `shown` findings of each kind."""
    lines = [f"{result.title}: {result.questions:,} questions, model {result.model or '(not named)'}"]
    width = max(map(len, result.numbers))
    for name, value in result.numbers.items():
        spread = f" ± {value.sd:.2f}" if result.repeats > 1 else ""
        of = f"   of {result.counts[f'{name} of']:,}" if f"{name} of" in result.counts else ""
        lines.append(f"{'*' if name == result.main else ' '} {name:<{width}} {value.mean:8.2f}{spread}{of}")
    for kind, (of_file, meaning) in FAULTS.items():
        members = [finding for finding in result.findings if finding.kind == kind]
        if members:
            lines.append(f"{len(members):,} {kind}: {meaning}; counted as wrong{' (allowed)' if of_file else ''}")
            lines += [f"  {finding}" for finding in members[:shown]]
            lines += [f"  and {len(members) - shown:,} more, in the file of --out"] * (len(members) > shown)
    return "\n".join(lines)


def _values(scores: Sequence[Score]) -> dict[str, Value]:
    columns: Mapping[str, Any] = scores[0].numbers
    taken = {name: [one.numbers[name] for one in scores] for name in columns}
    return {name: Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for name, values in taken.items()}  # fmt: skip
