"""Subjects to LLaVA JSON: requests, answers, turns, and refused answers with the reason.

The client's cache is the log: everything here is a pure function of it, so a killed run is simply run again.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.datagen import files
from llava_jax.datagen.parsing import Pair, Refusal, parse
from llava_jax.datagen.shots import KINDS, Shots
from llava_jax.datagen.subjects import Subject, context
from llava_jax.errors import DataError
from llava_jax.openai_client import Answer, Client, Failure, Request

MARKER = "<image>"
_VERDICTS = ("good", "refused", "unanswered")  # in the order of Result's fields


class Job(NamedTuple):
    """How one kind is generated. attempts: the most requests for one subject, until an answer is usable."""

    kind: str
    shots: Shots
    questions: Sequence[str]
    seed: int = 0
    attempts: int = 1
    temperature: float | None = None
    max_tokens: int | None = 2048


class Result(NamedTuple):
    """In the subjects' order. records: LLaVA JSON; rejects: {id, image, reason, text}; unanswered: without a text."""

    records: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    unanswered: list[dict[str, Any]]


def draw(choices: Sequence[Any], seed: int, *names: str) -> Any:
    """One of the choices, the same for the same seed and names, independent of other draws."""
    seed_text = "|".join([str(seed), *names])
    return choices[int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "big") % len(choices)]


def record(identity: str, image: str, turns: Sequence[Pair], seed: int) -> dict[str, Any]:
    """LLaVA JSON of some turns about a picture; `<image>` stands before or after the first question, drawn.

    Source: arXiv:2304.08485, equation 3 (the picture's side is drawn, in the first turn only).
    """
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    first = messages[0]["value"]
    messages[0]["value"] = draw((f"{MARKER}\n{first}", f"{first}\n{MARKER}"), seed, identity, "side")
    return {"id": identity, "image": image, "conversations": messages}


def make(
    client: Client, subjects: Sequence[Subject], job: Job,
    report: Callable[[int, dict[str, int]], None] = lambda done, counts: None,
) -> Result:  # fmt: skip
    """Asks about every subject, again about those whose answer was refused, up to `job.attempts` times.

    report: called with the number of subjects that are done, and counts.
    """
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in _VERDICTS}
    counts, exhausted = dict.fromkeys(_VERDICTS, 0), 0
    for choice in range(job.attempts):
        pending = [i for i in range(len(subjects)) if i not in rows["good"] and i not in rows["unanswered"]]
        if not pending:
            break
        for index, outcome in client.ask_many(_request(subjects[i], job, choice) for i in pending):
            verdict, row = _verdict(subjects[pending[index]], job, outcome)
            rows[verdict].setdefault(pending[index], []).append(row)
            counts[verdict] += 1
            exhausted += verdict == "refused" and choice + 1 == job.attempts
            report(counts["good"] + counts["unanswered"] + exhausted, counts)
    return Result(*([row for index in sorted(rows[name]) for row in rows[name][index]] for name in _VERDICTS))


def write(out: Path, job: Job, subjects: Sequence[Subject], result: Result, usage: dict[str, Any]) -> dict[str, Any]:
    """Writes KIND.json, KIND_rejects.jsonl, KIND_unanswered.jsonl and KIND_report.json; the report."""
    reasons = files.count(row["reason"].split(":")[0] for row in result.rejects)
    report = {
        "kind": job.kind, "subjects": len(subjects), "records": len(result.records), "refused": len(result.rejects),
        "refused_reasons": reasons, "unanswered": len(result.unanswered), "seed": job.seed, "attempts": job.attempts,
        "examples": len(job.shots.examples), "spent": usage,
    }  # fmt: skip
    files.write_json(out / f"{job.kind}.json", result.records)
    files.write_lines(out / f"{job.kind}_rejects.jsonl", result.rejects)
    files.write_lines(out / f"{job.kind}_unanswered.jsonl", result.unanswered)
    files.write_json(out / f"{job.kind}_report.json", report)
    return report


def brief(subjects: Sequence[Subject], questions: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Stage 1's records: a brief question, drawn, and one caption of each picture, drawn where there are several.

    Source: arXiv:2304.08485, section 4.2 (questions that ask to describe the image briefly, drawn for each pair).

    Raises:
      DataError: a caption is no text that a file can hold; names the id.
    """
    records = []
    for subject in subjects:
        question = draw(questions, seed, subject.id, "question")
        caption = draw(subject.captions, seed, subject.id, "caption")
        if not files.encodable(caption):
            raise DataError(f"id={subject.id!r}: caption {caption!r} holds half a character: correct it or remove it")
        records.append(record(subject.id, subject.image, [Pair(question, caption)], seed))
    return records


def _request(subject: Subject, job: Job, choice: int) -> Request:
    messages = job.shots.messages(context(subject, KINDS[job.kind].boxes))
    return Request(messages, temperature=job.temperature, max_tokens=job.max_tokens, choice=choice)


def _verdict(subject: Subject, job: Job, outcome: Answer | Failure) -> tuple[str, dict[str, Any]]:
    """One of _VERDICTS, and its row."""
    row = {"id": subject.id, "image": subject.image}
    if isinstance(outcome, Failure):
        return "unanswered", row | {"reason": outcome.reason}
    question = draw(job.questions, job.seed, subject.id, "question")
    try:
        turns = parse(job.kind, outcome.text, outcome.finish_reason, question)
    except Refusal as error:
        return "refused", row | {"reason": str(error), "text": outcome.text}
    return "good", record(subject.id, subject.image, turns, job.seed)
