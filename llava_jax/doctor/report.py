"""The lines of the checks, the table that is made of them, and the file for --json."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OK, SKIPPED, WARN, FAIL = "ok", "skipped", "warn", "FAIL"
VERDICTS = (OK, SKIPPED, WARN, FAIL)  # from good to bad
WIDEST = 72  # characters of a column; a longer cell pushes the rest of its line to the right
FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class Line:
    """What one check says on one process.

    Attributes:
      figure: what was measured; of a skipped check the reason.
      expectation: what a good machine has; "" where nobody knows.
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


def against(
    check: str, value: float | int, figure: str, least: float | int | None, expectation: str, remedy: str
) -> Line:  # fmt: skip
    """The line of a number: ok from `least` on (None: there is no expectation), else a warning."""
    if least is None:
        return Line(check, OK, figure, value=value)
    good = value >= least
    return Line(check, OK if good else WARN, figure, expectation, "" if good else remedy, value)


def skipped(check: str, reason: str) -> Line:
    """The line of a check that cannot be done here."""
    return Line(check, SKIPPED, f"because {reason}")


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(line) for line in lines]


def merged(processes: Sequence[Sequence[Line]]) -> list[Line]:
    """One line for each check: the worst verdict of all processes, and the lowest value among those."""
    names = dict.fromkeys(line.check for lines in processes for line in lines)
    return [_merged([(i, line) for i, lines in enumerate(processes) for line in lines if line.check == name],
                    len(processes)) for name in names]  # fmt: skip


def _merged(lines: Sequence[tuple[int, Line]], processes: int) -> Line:
    worst = max((line.verdict for _, line in lines), key=VERDICTS.index)
    shown = [(i, line) for i, line in lines if line.verdict == worst]
    number, line = min(shown, key=_rank)
    if len({line.figure for _, line in shown}) == 1 and len(shown) == processes:
        return line
    if line.value is not None and len(shown) == processes:
        return dataclasses.replace(line, figure=f"{line.figure} (process {number}, the lowest of {processes})")
    others = f", {len(shown) - 1} more" if len(shown) > 1 else ""
    return dataclasses.replace(line, figure=f"process {number} of {processes}{others}: {line.figure}")


def _rank(shown: tuple[int, Line]) -> tuple[bool, bool, float | int, int]:
    """What broke off a check comes before those who waited for it, then the lowest value, then the first process."""
    number, line = shown
    return not line.broken, line.value is None, line.value or 0, number


def table(lines: Sequence[Line]) -> str:
    """Columns verdict, check, figure, expectation; a remedy stands below its line."""
    cells = [("verdict", "check", "figure", "expectation")]
    cells += [(line.verdict, line.check, line.figure, line.expectation) for line in lines]
    widths = [max(len(cell[column]) for cell in cells if len(cell[column]) <= WIDEST) for column in range(3)]
    text = []
    for cell, remedy in zip(cells, ["", *(line.remedy for line in lines)]):
        text.append("  ".join([*(word.ljust(width) for word, width in zip(cell, widths)), cell[3]]).rstrip())
        if remedy:
            text.append(f"{'':{widths[0]}}  remedy: {remedy}")
    return "\n".join(text)


def summary(lines: Sequence[Line], secs: float) -> str:
    """The table's last line."""
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in VERDICTS}
    words = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
    return f"{len(lines)} lines: {words}; {secs:.0f} s"


def verdict(lines: Sequence[Line]) -> str:
    """The worst of all."""
    return max((line.verdict for line in lines), key=VERDICTS.index, default=OK)


def document(about: Mapping[str, Any], processes: Sequence[Mapping[str, Any]], secs: float) -> str:
    """The JSON file: what the machine is, and each process's lines."""
    lines = [line for process in processes for line in process["lines"]]
    worst = max((line["verdict"] for line in lines), key=VERDICTS.index, default=OK)
    content = {"format": FORMAT, "verdict": worst, "secs": round(secs, 1), **about, "processes": list(processes)}
    return json.dumps(content, indent=1) + "\n"
