"""Answers in, numbers out: no model, no accelerator, and every answer that is counted as wrong is listed.

There are two policies. Faults of files (a truncated line, an id twice, a question without an answer, a picture that
was missing) stop the scoring, each named by its id, until they are fixed or allowed; allowed, they count as wrong, or
as the benchmark's rule counts them.
Failings of the model (an empty answer, a letter that is no choice, a text without an answer) are what a benchmark
measures: its official rule counts them, and each is listed.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.errors import DataError, UsageError
from llava_jax.evaluate import answers
from llava_jax.evaluate.questions import FAULTS, Benchmark, Fault, Options, Question, Score


class Value(NamedTuple):
    """A number of one column: the mean over repeats, and their sample standard deviation (0.0 for one repeat)."""

    mean: float
    sd: float


class Result(NamedTuple):
    """Numbers of one run of one benchmark.

    model: the one that answered, also where a judge's reviews of it are scored. counts: of the first repeat. findings:
    faults that were allowed and failings of the model; lacking: how the rule counts them.
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
    lacking: str = "counted as wrong"


def score(
    benchmark: Benchmark, questions: Sequence[Question], paths: Sequence[epath.PathLike], options: Options,
    allow_faults: bool = False,
) -> Result:  # fmt: skip
    """The benchmark's numbers for the answers of one file, or of several shards.

    Raises:
      DataError: the files have faults and `allow_faults` is not set (names every one), or hold no answer at all, or
        questions of the user's own have no truth.
      UsageError: only the benchmark's server has the truth; it takes the files of `submission`.
    """
    without_truth = [question.id for question in questions if question.truth is None]
    if without_truth and benchmark.submit is None:
        raise DataError(f"{benchmark.name}: no truth for {len(without_truth):,} questions, {without_truth[0]!r} the "
                        "first: give each an answer to be scored")  # fmt: skip
    if benchmark.score is None or without_truth:
        raise UsageError(f"{benchmark.name}: not all of its answers are public (options {dict(options)}): "
                         "--submission DIR writes the files for its server")  # fmt: skip
    contents = answers.read(paths)
    by_repeat, unmatched = answers.match(questions, contents.answers)
    faults = [*contents.faults, *unmatched]
    blocking = [fault for fault in faults if FAULTS[fault.kind][0]]
    where, unknown = ", ".join(map(str, paths)), any(fault.kind == "unknown_id" for fault in unmatched)
    if blocking and not allow_faults:
        raise DataError("\n".join([
            f"{where}: {len(blocking)} faults, so no score; correct them, or score without with --allow-faults:",
            *(f"  {fault}" for fault in blocking),
            *([f"ids of {benchmark.name} are {benchmark.ids}"] if benchmark.ids and unknown else []),
        ]))  # fmt: skip
    if not by_repeat:
        raise DataError(f"{where}: no answer to any of the {len(questions)} questions of {benchmark.name}")
    scores = [benchmark.score(questions, texts, options) for texts in by_repeat.values()]
    models = sorted(set(map(_answering_model, contents.answers)))
    return Result(
        benchmark.name, benchmark.title, ", ".join(models), dict(options), len(questions), len(scores), _values(scores),
        scores[0].main, scores[0].counts, (*faults, *(finding for part in scores for finding in part.findings)),
        scores[0].lacking,
    )  # fmt: skip


def submission(
    benchmark: Benchmark, questions: Sequence[Question], paths: Sequence[epath.PathLike], options: Options,
    data: epath.PathLike, directory: epath.PathLike,
) -> tuple[str, ...]:  # fmt: skip
    """Writes the files for the benchmark's server into `directory`; their paths. data: the benchmark's files.

    Raises:
      DataError: a question has no answer or several, or a line is broken; names each. ValueError: it has no server.
    """
    if benchmark.submit is None:
        raise UsageError(f"{benchmark.name} has no submission file: `score` computes its numbers here")
    merged = answers.merge(questions, paths)
    if any(answer.repeat for answer in merged):
        raise UsageError(f"{', '.join(map(str, paths))}: holds repeats; a server wants one answer to a question")
    folder = epath.Path(directory)
    contents = benchmark.submit(epath.Path(data), questions, {answer.id: answer.text for answer in merged}, options)
    for name, content in contents.items():
        files.write_whole(folder / name, content)
    return tuple(str(folder / name) for name in contents)


def _answering_model(answer: answers.Answer) -> str:
    """The model; of a judge's review, the candidate that it is about."""
    candidate = answer.metadata.get("candidate")
    return candidate if isinstance(candidate, str) and candidate else answer.model


def to_json(result: Result, run: str = "") -> dict[str, Any]:
    """The result as a JSON object, for `report`; run: what to call it there."""
    numbers = {name: {"mean": value.mean, "sd": value.sd} for name, value in result.numbers.items()}
    findings = [finding._asdict() for finding in result.findings]
    return {"run": run or result.model, **result._asdict(), "numbers": numbers, "findings": findings}


def write(path: epath.PathLike, result: Result, run: str = "") -> None:
    """Writes the file that `from_json` reads."""
    text = json.dumps(to_json(result, run), indent=1, ensure_ascii=False)
    files.write_whole(path, text.encode("utf-8", "backslashreplace"))


def from_json(path: epath.PathLike) -> tuple[str, Result]:
    """(run, result) of a file that `to_json` filled.

    Raises:
      DataError: it is no such file.
    """
    try:
        row = json.loads(files.read(path))
        run = row.pop("run")
        row["numbers"] = {name: Value(**value) for name, value in row["numbers"].items()}
        row["findings"] = tuple(Fault(**finding) for finding in row["findings"])
        result = Result(**row)
        _check(run, result)
        return run, result
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not a file that `score --out` wrote: {type(error).__name__}: {error}") from None


def _check(run: Any, result: Result) -> None:
    """Raises ValueError where a value has another type than `to_json` writes."""
    texts = (run, result.benchmark, result.title, result.model, result.main, result.lacking)
    numbers = [number for value in result.numbers.values() for number in value]
    if not all(isinstance(text, str) for text in (*texts, *(text for one in result.findings for text in one))):
        raise ValueError("a name or a finding is no text")
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers):
        raise ValueError("a number is none")
    if not all(type(count) is int for count in (result.questions, result.repeats, *result.counts.values())):
        raise ValueError("a count is none")
    if not isinstance(result.options, dict) or result.main not in result.numbers:
        raise ValueError("the options or the main number are missing")


def cell_text(result: Result, column: str) -> str:
    """A number as a table's cell: "81.50 ± 0.25" of several repeats, "-" of an empty group, "" where there is none."""
    if column not in result.numbers:
        return ""
    if result.counts.get(f"{column} of") == 0:
        return "-"
    value = result.numbers[column]
    return f"{value.mean:.2f}" + (f" ± {value.sd:.2f}" if result.repeats > 1 else "")


def text(result: Result, limit: int = 20) -> str:
    """The result for a terminal: columns, counts of findings, and the first `listed` findings of each kind."""
    options = ", ".join(f"{name}={value}" for name, value in result.options.items() if value)
    lines = [f"{result.title}: {result.questions:,} questions, model {result.model or '(not named)'}"
             + (f" ({options})" if options else "")]  # fmt: skip
    width = max(map(len, result.numbers))
    for name in result.numbers:
        of = f"   of {result.counts[f'{name} of']:,}" if f"{name} of" in result.counts else ""
        lines.append(f"{'*' if name == result.main else ' '} {name:<{width}} {cell_text(result, name):>8}{of}")
    for kind, (of_file, meaning) in FAULTS.items():
        members = [finding for finding in result.findings if finding.kind == kind]
        if members:
            lines.append(f"{len(members):,} {kind}: {meaning}; {result.lacking}{' (allowed)' if of_file else ''}")
            lines += [f"  {finding}" for finding in members[:limit]]
            lines += [f"  and {len(members) - limit:,} more, in the file of --out"] * (len(members) > limit)
    return "\n".join(lines)


def _values(scores: Sequence[Score]) -> dict[str, Value]:
    columns: Mapping[str, Any] = scores[0].numbers
    by_column = {name: [score.numbers[name] for score in scores] for name in columns}
    return {name: Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for name, values in by_column.items()}  # fmt: skip
