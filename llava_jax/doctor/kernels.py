"""Attention's kernels on the chips themselves, forward and backward, against the oracle that the tests use too."""

import time
from collections.abc import Iterator

import jax

from llava_jax.doctor.machine import Machine
from llava_jax.doctor.report import FAIL, OK, Line
from llava_jax.models import attention_check
from llava_jax.models.attention_check import CASES, Case, Row

ACCELERATOR_SECS, CPU_SECS = 75.0, 8.0  # no case begins after them: each compiles for seconds
REMEDY = ("do not train here: this version of XLA or of a kernel computes something else on this chip; please send us "
          "the file of --json")  # fmt: skip


def check(found: Machine) -> Iterator[Line]:
    """A line for each backend of the platform, and one for this process's other devices, which compute one case."""
    limit_secs = ACCELERATOR_SECS if found.accelerated else CPU_SECS
    first, *others = jax.local_devices()
    begin, rows, done = time.monotonic(), list[Row](), 0
    with jax.default_device(first):
        for case in CASES:
            if done and time.monotonic() - begin > limit_secs:
                break
            rows += attention_check.measure(case, attention_check.serving(found.platform, case))
            done += 1
    words = f"{done} of {len(CASES)} cases"
    for backend in dict.fromkeys(row.backend for row in rows):
        yield _line(f"attention: {backend}", [row for row in rows if row.backend == backend], words)
    if others and found.accelerated:
        yield _line("attention: other devices", _elsewhere(found, others, CASES[0]), f"{len(others)} devices, 1 case")


def _elsewhere(found: Machine, devices: list[jax.Device], case: Case) -> list[Row]:
    rows = list[Row]()
    for device in devices:
        with jax.default_device(device):
            rows += attention_check.measure(case, attention_check.serving(found.platform, case)[:1])
    return rows


def _line(name: str, rows: list[Row], words: str) -> Line:
    """The case that is nearest to its limit, or furthest above it. NaN is no number below a limit."""
    worst = max(rows, key=lambda row: row.figure / row.limit if row.figure == row.figure else float("inf"))
    good = worst.figure <= worst.limit
    detail = "\n".join(f"{row.backend} {row.what}: {row.figure:.4g} of {row.limit:g}" for row in rows)
    figure, expectation = f"{words}, error {worst.figure:.3g} of {worst.limit:g}", "rounding alone, backward too"
    if good:
        return Line(name, OK, figure, expectation, detail=detail)
    return Line(name, FAIL, f"{figure} ({worst.what})", expectation, REMEDY, detail=detail)
