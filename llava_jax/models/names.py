"""How the tensors of other projects are called: rows (pattern over our names, their name, how axes lie).

Each part of a model writes such a table in its own file; `llava_jax.convert` reads them, both ways.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEVER_RUN = "vision/tail/"  # beginning of the parameters after the selected hidden state, kept for a round trip


class Axes(NamedTuple):
    """How their axes become ours: `ours = theirs.transpose(order)`; empty is the same order.

    Attributes:
      ones: axes of size 1 that theirs begin with and ours have not.
    """

    order: tuple[int, ...] = ()
    ones: int = 0

    def ours(self, array: np.ndarray) -> np.ndarray:
        array = array.reshape(array.shape[self.ones :])
        return array.transpose(self.order) if self.order else array

    def theirs(self, array: np.ndarray) -> np.ndarray:
        array = array.transpose(np.argsort(self.order)) if self.order else array
        return array.reshape(*[1] * self.ones, *array.shape) if self.ones else array

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        kept = [shape[i] for i in np.argsort(self.order)] if self.order else shape
        return (*[1] * self.ones, *kept)


SAME = Axes()
ROW, CELL = Axes(ones=1), Axes(ones=2)  # theirs [1, ...] and [1, 1, ...]
LINEAR = Axes((1, 0))  # torch keeps [out, in], we [in, out]
PATCH = Axes((2, 3, 1, 0))  # torch keeps [out, in, row, column], we [row, column, in, out]

# Their name may hold `{layer}`: our parameter then stacks theirs over the layers, or with `{layer*2}` over every second
# one. Groups of our pattern may stand in it as \1.
Row = tuple[str, tuple[str, Axes]]


def linear(ours: str, theirs: str) -> list[Row]:
    """The rows of a linear layer with a bias."""
    return [(f"{ours}/kernel", (f"{theirs}.weight", LINEAR)), (f"{ours}/bias", (f"{theirs}.bias", SAME))]


def norm(ours: str, theirs: str) -> list[Row]:
    """The rows of a norm with a bias."""
    return [(f"{ours}/scale", (f"{theirs}.weight", SAME)), (f"{ours}/bias", (f"{theirs}.bias", SAME))]
