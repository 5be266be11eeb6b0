"""Another commit of this repository as a side of the benchmark: its own code runs its own pairs.

This file is today's; whatever it imports from `tests` and `llava_jax` is that commit's (`turns.Job.root`), which may be
too old to read today's checkpoints. It writes weights and pictures for itself, from the same seed.
"""

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

JOBS = "jobs.pickle"


def prepare(
    folder: Path, size: str, what: Sequence[str], batches: Path
) -> Callable[[], tuple[float, dict[str, float]]]:
    """Writes the input; the check: the work of a turn of each pair.

    Args:
      size: the name of a `Sizes` in its `same`.
      what: keys of `bench.PAIRS`; those that it lacks are left out.
      batches: today's tokens, in place of those that it would draw.
    """
    from tests.benchmarks import bench, same

    sizes = getattr(same, size)
    same.write(folder, sizes)
    shutil.copy(batches, folder / same.BATCHES)
    pairs = [pair for key in what if key in bench.PAIRS for pair in bench.PAIRS[key](folder, sizes)]
    # Before a mixture had a folder of its own no pair named its folder.
    own = {pair.what: pair.arguments if isinstance(pair.arguments[0], Path) else (folder, sizes, *pair.arguments)
           for pair in pairs}  # fmt: skip
    (folder / JOBS).write_bytes(pickle.dumps({pair.what: (pair.function, own[pair.what]) for pair in pairs}))
    return lambda: (0.0, {pair.what: pair.work for pair in pairs})


def side(folder: Path, what: str) -> Callable[[], tuple[float, list[float]]]:
    """The turns of one pair."""
    from tests.benchmarks import ours

    function, arguments = pickle.loads((folder / JOBS).read_bytes())[what]
    return getattr(ours, function)(*arguments)
