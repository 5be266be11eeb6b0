"""What `data validate` prints and writes: findings as they come, their counts, and the records that are fit."""

import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from llava_jax import errors, files
from llava_jax.data.check import Checks, UnknownKeys, allowed_bad
from llava_jax.data.problems import REASONS, Finding
from llava_jax.data.sources import Source, open_source
from llava_jax.data.validate import validate
from llava_jax.errors import DataError, UsageError

_NOTES_SHOWN = 20


class Place(NamedTuple):
    """Where records are. trained: they are; False: they only validate, and bad ones are left out of that."""

    path: str
    images: str | None
    split: str
    trained: bool = True


class Task(NamedTuple):
    """What to validate. look: for image files; unchecked: what is not looked at, for the last line."""

    places: Sequence[Place]
    checks: Checks
    look: bool
    skip_budget: float
    unchecked: tuple[str, ...]


class _Count(NamedTuple):
    """Of one place. unread: it cannot be opened at all."""

    place: Place
    records: int
    bad: int
    unread: bool = False

    @property
    def refused(self) -> bool:
        """Whether there is nothing to learn from."""
        return self.unread or self.bad == self.records


class _Printer:
    """Prints findings and counts them by reason."""

    def __init__(self, as_json: bool):
        self.as_json, self.counts, self.unknown = as_json, collections.Counter[str](), UnknownKeys()

    def show(self, finding: Finding) -> None:
        self.counts[finding.reason] += 1
        if self.as_json:
            print(json.dumps(dataclasses.asdict(finding) | {"refused": finding.fatal}))
        elif finding.fatal or self.counts[finding.reason] <= _NOTES_SHOWN:
            print(finding)

    def summary(self) -> None:
        for reason, count in self.counts.most_common():
            refused, meaning = REASONS[reason]
            print(f"{count:9,} {reason:22} {'refused' if refused else 'used   '} {meaning}")


def run(task: Task, open_images: bool, as_json: bool, out: str | None) -> int:
    """Validates; the exit code: 0, or 65 where training would end with it."""
    start, printer, fit = time.monotonic(), _Printer(as_json), list[str]()
    if out:
        _check_out(out, task)
    counts = [_examine(place, task, open_images, printer, fit if out else None) for place in task.places]
    for finding in printer.unknown.findings():
        printer.show(finding)
    if out and fit:
        _write(out, fit)
    trained = [count for count in counts if count.place.trained]
    records, bad = (sum(column) for column in zip(*(count[1:3] for count in trained)))
    allowed = allowed_bad(task.skip_budget, records)
    refused = bad > allowed or any(count.refused for count in counts)
    secs = time.monotonic() - start
    if as_json:
        print(json.dumps({"records": records, "bad": bad, "allowed": allowed, "counts": printer.counts,
                          "secs": round(secs, 3)}))  # fmt: skip
        return errors.DATA if refused else errors.DONE
    printer.summary()
    for count in counts if len(counts) > 1 else []:
        use = "" if count.place.trained else " (of validation: bad ones are left out)"
        print(f"{count.place.path}: {count.records:,} records, {count.bad:,} bad{use}")
    total = sum(count.records for count in counts)
    name = task.places[0].path if len(counts) == 1 else f"{len(counts)} sources"
    budget = f" (skip_budget={task.skip_budget} allows {allowed:,})" if task.skip_budget else ""
    skipped = f"; not checked: {', '.join(task.unchecked)}" if task.unchecked else ""
    print(f"{name}: {records:,} records, {bad:,} bad{budget}, in {secs:.1f} s ({total / secs:,.0f}/s){skipped}")
    if out:
        print(f"wrote {len(fit):,} records to {out}" if fit else f"{out} is not written: no record is fit")
    return errors.DATA if refused else errors.DONE


def _examine(place: Place, task: Task, open_images: bool, printer: _Printer, fit: list[str] | None) -> _Count:
    try:
        source = _opened(place)
    except DataError as error:
        printer.show(Finding(place.path, 0, None, "", "bad_source", str(error)))
        return _Count(place, 0, 1, True)
    bad = 0
    for verdict in validate(source, task.checks, task.look, open_images):
        bad += verdict.fatal
        for finding in verdict.findings:
            printer.show(finding)
        printer.unknown.note(verdict.unknown)
        if fit is not None and not verdict.fatal:
            fit.append(source.written(verdict.index))
    return _Count(place, len(source), bad)


def _opened(place: Place) -> Source:
    return open_source(place.path, place.images, split=place.split)


def _check_out(out: str, task: Task) -> None:
    if len(task.places) > 1:
        raise UsageError(f"--out {out} is of one file: name it as RECORDS beside --config")
    if epath.Path(out).suffix not in (".json", ".jsonl"):
        raise UsageError(f"--out {out}: want a name that ends in .json (one list) or .jsonl (a record a line)")
    if files.exists(out):
        raise UsageError(f"--out {out} exists already: remove it or choose another")
    if epath.Path(task.places[0].path).suffix not in (".json", ".jsonl"):
        raise UsageError(f"--out {out}: {task.places[0].path} is no JSON, whose records could be written again")


def _write(out: str, fit: Sequence[str]) -> None:
    lines = "\n".join(fit) if epath.Path(out).suffix == ".jsonl" else "[\n" + ",\n".join(fit) + "\n]"
    files.write_whole(out, f"{lines}\n".encode())
