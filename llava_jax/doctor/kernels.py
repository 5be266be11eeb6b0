"""Attention's kernels on the chips themselves, forward and backward, against the reference that the tests use too."""

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


def check(machine: Machine) -> Iterator[Line]:
    """A line for each backend of the platform, and one for this process's other devices, which compute one case."""
    limit_secs = ACCELERATOR_SECS if machine.accelerated else CPU_SECS
    first, *others = jax.local_devices()
    start, rows, count = time.monotonic(), list[Row](), 0
    with jax.default_device(first):
        for case in CASES:
            if count and time.monotonic() - start > limit_secs:
                break
            rows += attention_check.measure(case, attention_check.serving(machine.platform, case))
            count += 1
    coverage = f"{count} of {len(CASES)} cases"
    for backend in dict.fromkeys(row.backend for row in rows):
        yield _line(f"attention: {backend}", [row for row in rows if row.backend == backend], coverage)
    if others and machine.accelerated:
        other_rows = _other_device_rows(machine, others, CASES[0])
        yield _line("attention: other devices", other_rows, f"{len(others)} devices, 1 case")


def _other_device_rows(machine: Machine, devices: list[jax.Device], case: Case) -> list[Row]:
    rows = list[Row]()
    for device in devices:
        with jax.default_device(device):
            rows += attention_check.measure(case, attention_check.serving(machine.platform, case)[:1])
    return rows


def _line(name: str, rows: list[Row], coverage: str) -> Line:
    """The case that is nearest to its limit, or furthest above it. NaN is no number below a limit."""
    worst = max(rows, key=lambda row: row.figure / row.limit if row.figure == row.figure else float("inf"))
    good = worst.figure <= worst.limit
    detail = "\n".join(f"{row.backend} {row.what}: {row.figure:.4g} of {row.limit:g}" for row in rows)
    figure, expectation = f"{coverage}, error {worst.figure:.3g} of {worst.limit:g}", "rounding alone, backward too"
    if good:
        return Line(name, OK, figure, expectation, detail=detail)
    return Line(name, FAIL, f"{figure} ({worst.what})", expectation, REMEDY, detail=detail)
