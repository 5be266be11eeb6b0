"""The type of a benchmark: questions, an official rule that turns answers into numbers, and the files that it needs.

Every benchmark is one module of `benchmarks/` with one `Benchmark`, the only thing that the commands import from it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.data.files import unique_keys
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt.conversation import Video

SHORT = "Answer the question using a single word or phrase."  # Source: haotian-liu/LLaVA docs/Evaluation.md:13-18
LETTER = "Answer with the option's letter from the given choices directly."  # Source: the same, 20-29
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FILE = "FILE"  # an allowed value of an option: any path

# kind -> (is it a fault of a file, its meaning). A file's faults stop `score` until they are corrected or allowed;
# a model's failings are part of its score: the official rule counts them as wrong, and each is listed by its id.
FAULTS = {
    "truncated_line": (True, "the line is no JSON, as a kill leaves it"),
    "bad_shape": (True, "a field is missing or has the wrong type"),
    "duplicate_id": (True, "an id that an earlier row has"),
    "unknown_id": (True, "an answer to a question that the benchmark does not ask"),
    "missing_answer": (True, "a question without an answer"),
    "missing_image": (True, "the picture's or video's file does not exist"),
    "bad_image": (True, "the picture or video cannot be read or sent, or lies outside of the benchmark's folder"),
    "empty_question": (True, "a question without text"),
    "empty_truth": (True, "the benchmark's own answer is empty"),
    "wrong_truth": (True, "the benchmark's own answer is none of its choices"),
    "not_answered": (True, "the endpoint gave no answer"),
    "empty_answer": (False, "an answer without text"),
    "wrong_letter": (False, "a letter that is none of the question's choices"),
    "unparsed": (False, "no answer can be read out of the text"),
}


class Fault(NamedTuple):
    """One thing that is wrong. kind: a key of `FAULTS`; where: file and line or record, "" if it is in no file."""

    kind: str
    id: str
    detail: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where + ' ' if self.where else ''}id={self.id!r} {self.kind}: {self.detail}"


class BadBenchmark(DataError):
    """The benchmark's own files have faults; the message names each."""


@dataclass(frozen=True)
class Question:
    """One question.

    id: unique within the benchmark. text: without a picture's marker.
    images: paths relative to the benchmark's picture folder, encoded bytes, or `Video`s of either.
    kind: the category that numbers are broken down by. choices: how many lettered choices there are; 0: none.
    truth: the right answer, in the benchmark's own form; None where only a server has it.
    facts: further inputs of its rule.
    """

    id: str
    text: str
    images: tuple[str | bytes | Video, ...] = ()
    kind: str = ""
    choices: int = 0
    truth: Any = None
    facts: Mapping[str, Any] | None = None


class Score(NamedTuple):
    """Numbers of one run. numbers: {column: value}, in the order of the benchmark's own table; main: its headline.

    counts: {label: number}; findings: failings of the model. lacking: how the rule counts these, and missing answers.
    """

    numbers: dict[str, float]
    main: str
    counts: dict[str, int]
    findings: tuple[Fault, ...] = ()
    lacking: str = "counted as wrong"


class Need(NamedTuple):
    """A file or folder of a benchmark: its place below the data directory, where it comes from, and when it is needed.

    only: "option=value", needed only then. pictures: needed to answer, not to score.
    """

    path: str
    source: str
    only: str = ""
    pictures: bool = False


Answers = Mapping[str, str]  # {question id: the answer's text}
Options = Mapping[str, str]
ReadResult = tuple[list[Question], list[Fault]]


class Benchmark(NamedTuple):
    """One benchmark.

    images: folder of the pictures below the data directory.
    needs: the required files. read: its questions, and the faults of its files.
    score: its official rule, None where only a server has the truth.
    submit: {file name: content} for its server, from its data directory, questions and answers; or None.
    tokens: the limit of an answer. options: {name: allowed values, the default first}. ids: the form of its ids, for
    the error about unknown ids.
    """

    name: str
    title: str
    images: str
    needs: tuple[Need, ...]
    read: Callable[[epath.Path, Options], ReadResult]
    score: Callable[[Sequence[Question], Answers, Options], Score] | None = None
    submit: Callable[[epath.Path, Sequence[Question], Answers, Options], dict[str, bytes]] | None = None
    tokens: int = 16
    options: Mapping[str, tuple[str, ...]] | None = None
    ids: str = ""


def load_questions(
    benchmark: Benchmark, directory: epath.PathLike, options: Options, images: bool = False, allow_missing: bool = False
) -> ReadResult:
    """The benchmark's questions, and a fault for each picture that is missing and allowed to be.

    images: look for the pictures' files.

    Raises:
      DataError: a file is missing (names it, its source and the layout), or has faults (names each).
    """
    root = epath.Path(directory)
    needs = [need for need in _active_needs(benchmark, options) if images or not need.pictures]
    missing = [need for need in needs if not files.exists(root / need.path)]
    if missing:
        raise DataError("\n".join([
            f"{benchmark.name}: {directory} lacks {len(missing)} of what {benchmark.title} needs:",
            *(f"  {need.path}    from {need.source}" for need in missing),
            f"The whole layout: `python -m llava_jax.evaluate list {benchmark.name}`",
        ]))  # fmt: skip
    questions, faults = benchmark.read(root, options)
    faults += _faults(questions)
    missing_images = _missing_images(questions, root / benchmark.images) if images else []
    if faults or (missing_images and not allow_missing):
        raise bad_benchmark(f"{benchmark.name}: {directory}", [*faults, *missing_images])
    if not questions:
        raise DataError(f"{benchmark.name}: {directory} holds no questions")
    return questions, missing_images


def resolve_options(benchmark: Benchmark, assignments: Sequence[str]) -> dict[str, str]:
    """All options of the benchmark, from words such as "split=val"; the first of the allowed values is the default.

    Raises:
      UsageError: an unknown option or value.
    """
    allowed = benchmark.options or {}
    options = {name: values[0] for name, values in allowed.items()}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if name not in allowed or not equals:
            raise UsageError(f"--option {assignment}: {benchmark.name} knows {_option_text(allowed)}")
        if value not in allowed[name] and FILE not in allowed[name]:
            raise UsageError(f"--option {assignment}: want one of {', '.join(allowed[name])}")
        options[name] = value
    return options


def bad_benchmark(where: str, faults: Sequence[Fault]) -> BadBenchmark:
    """The error that names every fault."""
    return BadBenchmark("\n".join([f"{where}: {len(faults)} faults", *(f"  {fault}" for fault in faults)]))


def lines(path: epath.Path) -> tuple[list[tuple[str, Any]], list[Fault]]:
    """[(where, value)] of a JSON lines file, and a fault for each line that is no JSON. Blank lines are left out."""
    rows, faults = [], []
    for number, line in enumerate(files.read(path).decode("utf-8-sig", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line, object_pairs_hook=unique_keys)))
        except (ValueError, RecursionError) as error:
            faults.append(Fault("truncated_line", _id_in_line(line), f"{error}; it begins {line[:60]!r}",
                                f"{path}:{number}"))  # fmt: skip
    return rows, faults


def sound_lines(path: epath.Path) -> list[tuple[str, Any]]:
    """As `lines`, of a file without broken ones.

    Raises:
      BadBenchmark: a line is no JSON.
    """
    rows, faults = lines(path)
    if faults:
        raise bad_benchmark(str(path), faults)
    return rows


def with_choices(question: str, choices: Sequence[str], suffix: str = LETTER) -> str:
    """The question, a line for each choice, and what to answer with."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices)]
    return "\n".join([question, *lines, suffix])


def percent(right: int | float, of: int) -> float:
    """100 right / of; 0 for an empty group (its count in `Score.counts` is 0)."""
    return 100 * right / of if of else 0.0


def _missing_images(questions: Sequence[Question], folder: epath.Path) -> list[Fault]:
    """A fault for each picture that is not in the folder; each file is looked for once."""
    named = [(question.id, path) for question in questions for path in map(_source, question.images)
             if isinstance(path, str)]  # fmt: skip
    missing = files.missing(folder, {path for _, path in named})
    return [Fault("missing_image", id, f"{folder / path} does not exist") for id, path in named if path in missing]


def _source(image: str | bytes | Video) -> Any:
    return image.source if isinstance(image, Video) else image


def _faults(questions: Sequence[Question]) -> Iterator[Fault]:
    ids = set[str]()
    for question in questions:
        if question.id in ids:
            yield Fault("duplicate_id", question.id, "an earlier question has it too")
        ids.add(question.id)
        if not question.text.strip():
            yield Fault("empty_question", question.id, "its text is empty")
        if isinstance(question.truth, str) and not question.truth.strip():
            yield Fault("empty_truth", question.id, "its right answer is empty")
        elif question.choices and question.truth is not None:
            if question.truth not in tuple(LETTERS[: question.choices]):
                letters = LETTERS[: question.choices]
                yield Fault("wrong_truth", question.id, f"its right answer {question.truth!r} is none of {letters}")


def _active_needs(benchmark: Benchmark, options: Options) -> Iterator[Need]:
    for need in benchmark.needs:
        name, equals, value = need.only.partition("=")
        if not equals or options[name] == value:
            yield need


def _option_text(allowed: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{name}={'|'.join(filter(None, values))}" for name, values in allowed.items()) or "no options"


def _id_in_line(line: str) -> str:
    """The id at the beginning of a broken line, as far as it can be read."""
    for key in ('"question_id":', '"id":'):
        head, separator, rest = line.partition(key)
        if separator:
            return rest.split(",")[0].split("}")[0].strip().strip('"')
    return "?"
