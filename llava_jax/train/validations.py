"""The validation losses of a run: which of its steps is the best, and for how long none has been better."""

import sys

from etils import epath

from llava_jax import distributed, files
from llava_jax.checkpoint import best, manager
from llava_jax.checkpoint.best import Losses, Row
from llava_jax.errors import UnusableCheckpoint
from llava_jax.train import loop, metrics
from llava_jax.train.loop import Run
from llava_jax.train.step import State


class Validations:
    """The losses of a run, the same on all processes; process 0 keeps them in best.json, and all keep the best step.

    data: names the held-out records; losses of other records are not compared.
    step: of the state that the run goes on from; losses of later steps, which a kill left, come again.
    """

    def __init__(self, run: Run, data: str, step: int):
        self._run, self._data = run, data
        rows = _read(run.checkpoints.directory, data) if distributed.index() == 0 else ()
        everywhere = distributed.exchange("validations", rows)[0]
        self._rows: tuple[Row, ...] = tuple((at, loss) for at, loss in everywhere if at <= step)
        if found := best.lowest(self._rows):
            manager.keep_also(run.checkpoints, found[0])

    def add(self, step: int, state: State, loss: float) -> bool:
        """Keeps a step whose loss is the lowest so far, then writes the loss down; whether it is the lowest.

        The caller's row in the log comes last: a kill before it lets the hook be called again.
        """
        rows = tuple(row for row in self._rows if row[0] != step)
        is_lowest = best.lowest((*rows, (step, loss))) == (step, loss)
        if is_lowest:
            loop.save(self._run, step, state)
            manager.keep_also(self._run.checkpoints, step)
        self._rows = (*rows, (step, loss))
        if distributed.index() == 0:
            best.write(self._run.checkpoints.directory, Losses(self._data, self._rows))
        return is_lowest

    def why_over(self, patience: int) -> str:
        """Why the run ends here: so many validations in a row were no better; "" where it goes on."""
        step, loss = best.lowest(self._rows) or (0, float("inf"))
        if sum(at > step for at, _ in self._rows) < patience:
            return ""
        return f"no validation loss below {loss:.4f} (step {step}) in {patience} validations (train.patience)"


def _read(directory: epath.PathLike, data: str) -> tuple[Row, ...]:
    """The losses of earlier starts. Damage does not stop a good run: its log has them too."""
    try:
        losses = best.read(directory)
    except UnusableCheckpoint:
        path = epath.Path(directory) / best.FILE
        print(f"{path} is damaged: it is now called {files.set_aside(path).name}, and the losses of "
              f"{metrics.VALIDATION} are taken", file=sys.stderr, flush=True)  # fmt: skip
        logged = metrics.read(directory, metrics.VALIDATION)
        rows = tuple((row["step"], row["loss"]) for row in logged if isinstance(row.get("loss"), float))
        best.write(directory, Losses(data, rows))
        return rows
    if losses.rows and losses.data != data:
        print(f"{best.FILE}: the records that validate are others than before, so the losses before are not compared",
              file=sys.stderr, flush=True)  # fmt: skip
        return ()
    return losses.rows
