"""Another commit of this repository as a side of the benchmark: its own code times its own pairs, on its own input.

This file is today's; whatever it imports from `tests` and `llava_jax` is that commit's (`turns.Job.root`). `sizes` is
the name of a `Sizes` in its `same`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path


def prepare(folder: Path, sizes: str) -> Callable[[], tuple[float, dict[str, float]]]:
    """Writes the input; the check: the work of a turn of every pair, by what it is."""
    from tests.benchmarks import bench, same

    same.write(folder, getattr(same, sizes))
    work = {pair.what: pair.work for pair in _pairs(bench, folder, getattr(same, sizes))}
    return lambda: (0.0, work)


def side(folder: Path, sizes: str, what: str) -> Callable[[], tuple[float, list[float]]]:
    """The turns of one pair."""
    from tests.benchmarks import bench, ours, same

    pair = next(pair for pair in _pairs(bench, folder, getattr(same, sizes)) if pair.what == what)
    return getattr(ours, pair.function)(folder, getattr(same, sizes), *pair.arguments)


def _pairs(bench, folder: Path, sizes) -> Sequence:
    return [pair for pairs in bench.PAIRS.values() for pair in pairs(folder, sizes)]
