"""llava_jax against transformers + torch on this machine, in turn: `python -m tests.benchmarks.bench [--what train]`.

Same weights, same records, float32, all threads for both. Every pair must also compute the same (losses, ids, pixels),
or the run fails. `--base COMMIT` adds another commit of this repository as a third side. `--device` times a 7B model
with random weights on this machine's accelerator instead.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.benchmarks import same, turns
from tests.benchmarks.same import Sizes
from tests.benchmarks.turns import Job, Timing

RATE = 1e-4  # of training
READ_BATCH = 16
NAMES = ("llava_jax", "transformers + torch")


class Result(NamedTuple):
    """A line of the table. speeds: of each side by its median turn, per second; wish: how many times as fast."""

    what: str
    unit: str
    speeds: tuple[float, ...]
    spreads: tuple[tuple[float, float], ...]  # of our ratio to each other side in neighbouring turns: least and most
    wish: float

    @property
    def ratio(self) -> float:
        return self.speeds[0] / self.speeds[1]


@dataclass(frozen=True)
class Pair:
    """One comparison. work: units in a turn; same: whether two checks agree."""

    what: str
    unit: str
    work: float
    function: str
    arguments: tuple[object, ...]
    wish: float
    same: Callable[[Sequence[float], Sequence[float]], bool]


class Base(NamedTuple):
    """A checkout of another commit, its input, and its own pairs: the units in a turn of each."""

    root: Path
    folder: Path
    work: Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each side")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parser.add_argument("--small", action="store_true", help="everything tiny: whether it works, not how fast")
    parser.add_argument("--base", metavar="COMMIT", help="a third side: another commit of this repository")
    parser.add_argument("--device", action="store_true", help="a 7B model on this machine's accelerator, ours alone")
    parser.add_argument("--preset", help="of --device: another model, such as tiny", default="llava15_7b")
    told = parser.parse_args(argv)
    if told.device:
        from tests.benchmarks import device

        text = device.table(told.preset)
    else:
        text = compare("SMALL" if told.small else "FULL", told.what, told.rounds, told.base)
    print(text)
    if told.out:
        told.out.write_text(text)
    return 0


def compare(size: str, what: Sequence[str], rounds: int, commit: str | None = None) -> str:
    """The table of all comparisons.

    Args:
      size: the name of a `Sizes` in `same`.
      commit: the third side.

    Raises:
      AssertionError: the sides did not compute the same.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    sizes: Sizes = getattr(same, size)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        same.write(folder, sizes)
        base = stack.enter_context(checkout(commit, size, what, folder)) if commit else None
        pairs = [pair for key in what for pair in PAIRS[key](folder, sizes)]
        return table([measured(pair, rounds, base) for pair in pairs], commit)


@contextlib.contextmanager
def checkout(commit: str, size: str, what: Sequence[str], same_folder: Path) -> Iterator[Base]:
    """The commit in a temporary folder, beside the input that it writes for itself, as `base.prepare` does."""
    archive = subprocess.run(["git", "archive", commit], cwd=turns.ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(root, filter="data")
        job = Job("base", "prepare", (Path(folder), size, what, same_folder / same.BATCHES), Path(root))
        yield Base(Path(root), Path(folder), turns.alternate({commit: job}, 1)[commit].checks[0])


def measured(pair: Pair, rounds: int, base: Base | None = None) -> Result:
    """Runs one comparison, with `base` where it has the same."""
    modules = ("tests.benchmarks.ours", "tests.benchmarks.theirs")
    jobs = {name: Job(module, pair.function, pair.arguments) for name, module in zip(NAMES, modules)}
    works = [pair.work] * len(jobs)
    if base is not None and pair.what in base.work:
        jobs["base"] = Job("base", "side", (base.folder, pair.what), base.root)
        works.append(base.work[pair.what])
    timings = list(turns.alternate(jobs, rounds).values())
    for name, timing in zip(jobs, timings):
        for mine, other in zip(timings[0].checks, timing.checks):
            assert pair.same(mine, other), f"{pair.what}: {name} differs from ours: {other[:8]} and {mine[:8]}"
    result = _result(pair, works, timings)
    print(f"{result.what}: {' and '.join(f'{speed:,.1f}' for speed in result.speeds)} {result.unit}, "
          f"x {result.ratio:.2f}", file=sys.stderr, flush=True)  # fmt: skip
    return result


def _result(pair: Pair, works: Sequence[float], timings: Sequence[Timing]) -> Result:
    secs = [[each / work for each in timing.secs] for work, timing in zip(works, timings)]  # of a unit
    ratios = [[b / a for a, b in zip(secs[0], other)] for other in secs[1:]]
    speeds = tuple(work / timing.median for work, timing in zip(works, timings))
    return Result(pair.what, pair.unit, speeds, tuple((min(each), max(each)) for each in ratios), pair.wish)


def _training(folder: Path, sizes: Sizes) -> list[Pair]:
    kinds = {"full": f"{sizes.samples} samples of {sizes.longest} tokens",
             "mixed": f"{sizes.samples} samples of {sizes.shortest} to {sizes.longest} tokens"}  # fmt: skip
    batches = same.batches(folder)
    return [
        Pair(f"training step, {text}", "tokens/s", same.useful_tokens(batches[kind]), "train",
             (folder, sizes, kind, RATE), 1.2, _close(1e-3))
        for kind, text in kinds.items()
    ]  # fmt: skip


def _mixture(folder: Path, sizes: Sizes) -> list[Pair]:
    folder = folder / "mixture"
    sizes = same.write_mixture(folder, sizes)
    records, longest, row = sizes.mixture
    text = f"training, {records} records as long as LLaVA-1.5's, to {longest} tokens, in rows of {row}"
    kinds = {"mixture": text, "shared": f"{text}, records of a picture in trees"}
    batches = same.batches(folder)
    return [Pair(text, "tokens/s", same.useful_tokens(batches[kind]), "train", (folder, sizes, kind, RATE), 1.8,
                 _close(1e-3)) for kind, text in kinds.items()]  # fmt: skip


def _generation(folder: Path, sizes: Sizes) -> list[Pair]:
    text = f"greedy, {sizes.prompt_tokens} tokens in, {sizes.new_tokens} out, batch"
    return [
        Pair(f"{text} {rows}", "tokens/s", rows * sizes.new_tokens, "generate", (folder, sizes, rows),
             4.0, lambda a, b: a == b)
        for rows in (1, 4)
    ]  # fmt: skip


def _reading(folder: Path, sizes: Sizes) -> list[Pair]:
    height, width = sizes.picture
    cores = len(os.sched_getaffinity(0))
    return [
        Pair(f"input, JPEG of {width} x {height} to {sizes.image_size} pixels, padded", "images/s per core",
             sizes.records / cores, "read", (folder, sizes, min(READ_BATCH, sizes.records), False, cores), 2.0,
             _close(1e-3))
    ]  # fmt: skip


def _tiling(folder: Path, sizes: Sizes) -> list[Pair]:
    height, width = sizes.picture
    cores = len(os.sched_getaffinity(0))
    return [
        Pair(f"input, JPEG of {width} x {height} to {same.TILES} tiles of {sizes.image_size} pixels",
             "tiles/s per core", same.TILES * sizes.records / cores, "read",
             (folder, sizes, min(READ_BATCH, sizes.records), True, cores), 2.0, _close(1e-3))
    ]  # fmt: skip


PAIRS: dict[str, Callable[[Path, Sizes], list[Pair]]] = {
    "train": _training, "mixture": _mixture, "generate": _generation, "input": _reading, "tiles": _tiling,
}  # fmt: skip


def _close(tolerance: float) -> Callable[[Sequence[float], Sequence[float]], bool]:
    return lambda a, b: len(a) == len(b) and np.allclose(a, b, rtol=tolerance, atol=tolerance)


def table(results: Sequence[Result], commit: str | None = None) -> str:
    """Markdown: the results, and where and when they were measured.

    commit: the third side, which has no number where it lacks the pair.
    """
    head = ["", "unit", *NAMES, "times as fast", "wanted", *([commit, "times as fast"] if commit else [])]
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    for result in results:
        ours, theirs, *base = result.speeds
        times = [f"**{ours / speed:.2f}** ({least:.2f} to {most:.2f})"
                 for speed, (least, most) in zip(result.speeds[1:], result.spreads)]  # fmt: skip
        cells = [result.what, result.unit, f"{ours:,.0f}", f"{theirs:,.0f}", times[0], f"{result.wish:g}"]
        if commit:
            cells += [f"{base[0]:,.0f}", times[1]] if base else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", where(("jax", "transformers", "torch", "pillow"))]) + "\n"


def where(packages: Sequence[str]) -> str:
    """The machine, the versions, the day, and how busy the machine was with other things."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cores, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return (f"{cores} cores of {_processor()}, {platform.system()}, Python {platform.python_version()}, {versions}; "
            f"{datetime.date.today()}; load at the end {busy:.1f}.")  # fmt: skip


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return subprocess.run(["uname", "-p"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
