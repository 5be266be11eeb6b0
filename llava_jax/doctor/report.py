"""The lines of the checks, their table, and the file of --json."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OK, SKIPPED, WARN, FAIL = "ok", "skipped", "warn", "FAIL"
VERDICTS = (OK, SKIPPED, WARN, FAIL)  # from good to bad
MAX_CELL = 72  # characters of a column; a longer cell pushes the rest of its line to the right
FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class Line:
    """The result of one check on one process.

    Attributes:
      figure: the measurement; of a skipped check the reason.
      expectation: the measurement of a good machine; "" where none is known.
      value: the measured number where more is better. Of several processes the table shows the lowest.
      detail: more for the file, such as a traceback.
      broken: an exception ended the check, so other processes may wait for this one.
    """

    check: str
    verdict: str
    figure: str
    expectation: str = ""
    remedy: str = ""
    value: float | int | None = None
    detail: str = ""
    broken: bool = False


def threshold_line(
    check: str, value: float | int, figure: str, least: float | int | None, expectation: str, remedy: str
) -> Line:  # fmt: skip
    """The line of a number: ok from `least` on (None: there is no expectation), else a warning."""
    if least is None:
        return Line(check, OK, figure, value=value)
    good = value >= least
    return Line(check, OK if good else WARN, figure, expectation, "" if good else remedy, value)


def skipped_line(check: str, reason: str) -> Line:
    """The line of a check that cannot be done here."""
    return Line(check, SKIPPED, f"because {reason}")


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(line) for line in lines]


def merge(processes: Sequence[Sequence[Line]]) -> list[Line]:
    """One line for each check: the worst verdict of all processes, and the lowest value among those."""
    names = dict.fromkeys(line.check for lines in processes for line in lines)
    return [_merge_check([(i, line) for i, lines in enumerate(processes) for line in lines if line.check == name],
                         len(processes)) for name in names]  # fmt: skip


def _merge_check(lines: Sequence[tuple[int, Line]], processes: int) -> Line:
    worst = max((line.verdict for _, line in lines), key=VERDICTS.index)
    worst_lines = [(i, line) for i, line in lines if line.verdict == worst]
    number, line = min(worst_lines, key=_rank)
    if len({line.figure for _, line in worst_lines}) == 1 and len(worst_lines) == processes:
        return line
    if line.value is not None and len(worst_lines) == processes:
        return dataclasses.replace(line, figure=f"{line.figure} (process {number}, the lowest of {processes})")
    more = f", {len(worst_lines) - 1} more" if len(worst_lines) > 1 else ""
    return dataclasses.replace(line, figure=f"process {number} of {processes}{more}: {line.figure}")


def _rank(numbered: tuple[int, Line]) -> tuple[bool, bool, float | int, int]:
    """Lines of a check that broke off come before those that waited for it, then the lowest value, then process."""
    number, line = numbered
    return not line.broken, line.value is None, line.value or 0, number


def table(lines: Sequence[Line]) -> str:
    """Columns verdict, check, figure, expectation; a remedy stands below its line."""
    cells = [("verdict", "check", "figure", "expectation")]
    cells += [(line.verdict, line.check, line.figure, line.expectation) for line in lines]
    widths = [max(len(cell[column]) for cell in cells if len(cell[column]) <= MAX_CELL) for column in range(3)]
    text = []
    for cell, remedy in zip(cells, ["", *(line.remedy for line in lines)]):
        text.append("  ".join([*(word.ljust(width) for word, width in zip(cell, widths)), cell[3]]).rstrip())
        if remedy:
            text.append(f"{'':{widths[0]}}  remedy: {remedy}")
    return "\n".join(text)


def summary(lines: Sequence[Line], secs: float) -> str:
    """The table's last line."""
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in VERDICTS}
    verdict_counts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
    return f"{len(lines)} lines: {verdict_counts}; {secs:.0f} s"


def verdict(lines: Sequence[Line]) -> str:
    """The worst of all."""
    return max((line.verdict for line in lines), key=VERDICTS.index, default=OK)


def document(header: Mapping[str, Any], processes: Sequence[Mapping[str, Any]], secs: float) -> str:
    """The JSON file: a description of the machine, and each process's lines."""
    lines = [line for process in processes for line in process["lines"]]
    worst = max((line["verdict"] for line in lines), key=VERDICTS.index, default=OK)
    content = {"format": FORMAT, "verdict": worst, "secs": round(secs, 1), **header, "processes": list(processes)}
    return json.dumps(content, indent=1) + "\n"
