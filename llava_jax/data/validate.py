"""Every record of a source with what is wrong with it: training refuses exactly what is refused here."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from llava_jax.data.check import Checks, Listings, Reading, check_files, check_pictures, check_tokens, read
from llava_jax.data.problems import Finding, Problem
from llava_jax.data.records import Record, found
from llava_jax.data.sources import Source

_OPENERS = 8  # threads; PIL releases the interpreter lock while it decodes
_CHUNK = 256  # records


class Verdict(NamedTuple):
    """index: of the record in its source. findings: what is wrong with it; unknown: as `check.Reading`'s."""

    index: int
    findings: tuple[Finding, ...]
    unknown: tuple[Finding, ...]

    @property
    def fatal(self) -> bool:
        """Whether the record is refused."""
        return any(finding.fatal for finding in self.findings)


def validate(source: Source, checks: Checks, look: bool = True, open_images: bool = False) -> Iterator[Verdict]:
    """A verdict for each record, in order.

    Args:
      source: from `open_source`.
      checks: what the run asks of its records.
      look: whether the image files are there.
      open_images: decode every image (thousands a minute).
    """
    seen: dict[str, int] = {}
    listings: Listings = {}
    measured = checks.format is not None and (checks.format.tiling or checks.format.video)
    fetch = source.__getitem__ if open_images or measured else source.text
    with ThreadPoolExecutor(_OPENERS) as pool:
        for start in range(0, len(source), _CHUNK):
            records = [fetch(index) for index in range(start, min(start + _CHUNK, len(source)))]
            readings = [_checked(record, source, checks, listings if look else None) for record in records]
            if open_images:
                sound = [None if reading.fatal else reading.conversation for reading in readings]
                opened = pool.map(lambda one: check_pictures(one, source.images, checks.format) if one else [], sound)
                for reading, problems in zip(readings, opened):
                    reading.problems.extend(problems)
            for index, (record, reading) in enumerate(zip(records, readings), start):
                if isinstance(record.raw, dict) and record.raw.get("id") is not None:
                    first = seen.setdefault(record.id, index)
                    if first != index:
                        reading.problems.append(Problem("duplicate_id", f"{source.text(first).where} has it too"))
                findings = tuple([found(record, problem) for problem in reading.problems])
                yield Verdict(index, findings, reading.unknown)


def _checked(record: Record, source: Source, checks: Checks, listings: Listings | None) -> Reading:
    """What is wrong with a record, but for its pictures."""
    reading = read(record, checks.rules, source.images)
    if reading.fatal or reading.conversation is None:
        return reading
    if listings is not None:
        reading.problems.extend(check_files(reading.conversation, source.images, listings))
    reading.problems.extend(check_tokens(reading.conversation, checks, source.images))
    return reading

