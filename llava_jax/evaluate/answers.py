"""The answer file, answers.jsonl: one answer a line, in the field names of LLaVA's own answer files.

    {"question_id": "7", "prompt": "What is it?", "text": "A cat.", "model_id": "runs/stage2", "metadata": {}}

`metadata.repeat` numbers the answers to one question that was asked several times; `metadata.run` is a hash of all
that the answers depend on; `metadata.fault` names the reason why the question has no answer.
"""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.errors import DataError
from llava_jax.evaluate.questions import FAULTS, Fault, Question, lines


@dataclass(frozen=True)
class Answer:
    """One answer. model: what gave it; metadata: JSON values."""

    id: str
    text: str
    model: str = ""
    prompt: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repeat(self) -> int:
        return self.metadata.get("repeat", 0)


class AnswerFile(NamedTuple):
    """answers: in the file's order; faults: rows that are left out of them."""

    answers: tuple[Answer, ...]
    faults: tuple[Fault, ...]


def line(answer: Answer) -> str:
    """The answer as one line of the file, with its end."""
    row = {"question_id": answer.id, "prompt": answer.prompt, "text": answer.text, "model_id": answer.model,
           "metadata": dict(answer.metadata)}  # fmt: skip
    # Half a character, which JSON may hold and UTF-8 cannot, is written as its escape.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def read(paths: Sequence[epath.PathLike]) -> AnswerFile:
    """The answers of one file, or of the shards of several hosts.

    Of answers to one question (and repeat) the first counts; the others are faults, as are lines that are no JSON.

    Raises:
      DataError: a file does not exist.
    """
    by_key: dict[tuple[str, int], Answer] = {}
    faults: list[Fault] = []
    for path in map(epath.Path, paths):
        if not files.exists(path):
            raise DataError(f"answer file {path} does not exist: `answer` writes it")
        rows, unreadable = lines(path)
        faults += unreadable
        for where, row in rows:
            answer = _answer(row, where)
            if isinstance(answer, Fault):
                faults.append(answer)
            elif (key := (answer.id, answer.repeat)) in by_key:
                same = "the same text" if by_key[key].text == answer.text else "another text"
                faults.append(Fault("duplicate_id", answer.id, f"an earlier row answers it, with {same}", where))
            else:
                by_key[key] = answer
    return AnswerFile(tuple(by_key.values()), tuple(faults))


def match(questions: Sequence[Question], answers: Iterable[Answer]) -> tuple[dict[int, dict[str, str]], list[Fault]]:
    """{repeat: {id: text}}, in the questions' order, and faults: no answer, an unknown id, an empty text."""
    by_id = {question.id: question for question in questions}
    unknown = f"the benchmark asks no such question; its ids are such as {next(iter(by_id), '')!r}"
    by_repeat: dict[int, dict[str, Answer]] = collections.defaultdict(dict)
    faults = []
    for answer in answers:
        if answer.id not in by_id:
            faults.append(Fault("unknown_id", answer.id, unknown))
        elif "fault" in answer.metadata:
            faults.append(Fault(answer.metadata["fault"], answer.id, str(answer.metadata.get("detail", ""))))
        else:
            by_repeat[answer.repeat][answer.id] = answer
    for repeat, answers_of_repeat in sorted(by_repeat.items() or {0: {}}.items()):
        suffix = f" in repeat {repeat}" if repeat else ""
        faulty_ids = {fault.id for fault in faults}
        for question in questions:
            if question.id not in answers_of_repeat and question.id not in faulty_ids:
                faults.append(Fault("missing_answer", question.id, f"no row answers it{suffix}"))
            elif question.id in answers_of_repeat and not answers_of_repeat[question.id].text.strip():
                faults.append(Fault("empty_answer", question.id, f"its text is empty{suffix}"))
    return {repeat: {q.id: answers_of_repeat[q.id].text for q in questions if q.id in answers_of_repeat}
            for repeat, answers_of_repeat in sorted(by_repeat.items())}, faults  # fmt: skip


def merge(questions: Sequence[Question], paths: Sequence[epath.PathLike]) -> tuple[Answer, ...]:
    """The answers of all hosts, in the benchmark's order: equal to the file of a single host.

    Raises:
      DataError: a broken line, an id twice, an unknown one, or none for a question; names each.
    """
    contents = read(paths)
    _, faults = match(questions, contents.answers)
    faults = [*contents.faults, *faults]
    blocking = [fault for fault in faults if FAULTS[fault.kind][0] and fault.kind not in ("missing_image",)]
    if blocking:
        raise DataError("\n".join([f"{len(blocking)} faults in {', '.join(map(str, paths))}",
                                   *(f"  {fault}" for fault in blocking)]))  # fmt: skip
    runs = {answer.metadata.get("run", "") for answer in contents.answers}
    if len(runs) > 1:
        raise DataError(f"{', '.join(map(str, paths))} hold answers of {len(runs)} different runs (metadata.run: "
                        f"{', '.join(sorted(runs))}): merge the shards of one")  # fmt: skip
    return tuple(in_order(questions, contents.answers))


def in_order(questions: Sequence[Question], answers: Iterable[Answer]) -> Iterator[Answer]:
    """The answers in the questions' order, repeats of one question together."""
    position = {question.id: number for number, question in enumerate(questions)}
    yield from sorted(answers, key=lambda answer: (position[answer.id], answer.repeat))


def write(path: epath.PathLike, answers: Iterable[Answer]) -> None:
    """Writes the file atomically."""
    files.write_whole(path, "".join(map(line, answers)).encode())


def _answer(row: Any, where: str) -> Answer | Fault:
    """One row; ids of LLaVA's own files may be numbers."""
    identity = row.get("question_id", row.get("id")) if isinstance(row, dict) else None
    if type(identity) not in (str, int):
        return Fault("bad_shape", "?", "want an object with question_id and text", where)
    text, metadata = row.get("text"), row.get("metadata", {})
    if not isinstance(text, str) or not isinstance(metadata, dict):
        return Fault("bad_shape", str(identity), f"text={str(text)[:60]!r}: want a string", where)
    repeat, fault, run = metadata.get("repeat", 0), metadata.get("fault", "not_answered"), metadata.get("run", "")
    if type(repeat) is not int or repeat < 0 or not isinstance(run, str) or fault not in tuple(FAULTS):
        return Fault("bad_shape", str(identity), "metadata: want a number `repeat`, a known `fault`, a text `run`",
                     where)  # fmt: skip
    return Answer(str(identity), text, str(row.get("model_id", "")), str(row.get("prompt", "")), metadata)
