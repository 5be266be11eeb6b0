"""Features of pictures on the host, so that a picture that is shown again does not pass through the tower again."""

import itertools
from collections import OrderedDict

import numpy as np

from llava_jax.batch import NEWLINE, Layout
from llava_jax.generate.pages import Shown


class Features:
    """Pictures' features, laid out as they stand in a prompt, [length, D]; the longest unused go first.

    most_bytes: of those that are kept. newline: float [D].
    """

    def __init__(self, most_bytes: int, newline: np.ndarray | None, dtype: np.dtype) -> None:
        self._most_bytes, self._newline, self._dtype = most_bytes, newline, dtype
        self._bytes = 0
        self._held: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._wanted: OrderedDict[bytes, tuple[Shown, list[np.ndarray | None]]] = OrderedDict()

    def find(self, shown: Shown) -> np.ndarray | None:
        """The features of a picture; None where they are not there, which `pending` then hands out."""
        if shown.key in self._held:
            self._held.move_to_end(shown.key)
            return self._held[shown.key]
        if shown.key not in self._wanted:
            self._wanted[shown.key] = shown, [None] * len(shown.tiles)
        return None

    def pending(self, most: int) -> list[tuple[Shown, int, np.ndarray]]:
        """At most so many tiles whose features are wanted: the picture, which of its tiles, and its pixels."""
        tiles = ((shown, index, shown.tiles[index]) for shown, found in self._wanted.values()
                 for index, features in enumerate(found) if features is None)  # fmt: skip
        return list(itertools.islice(tiles, most))

    def add(self, shown: Shown, index: int, features: np.ndarray) -> None:
        """Takes the features [N, D] of a tile."""
        found = self._wanted[shown.key][1]
        found[index] = features
        if any(one is None for one in found):
            return
        del self._wanted[shown.key]
        held = laid_out(np.stack(found), shown.layout, self._newline, self._dtype)
        self._held[shown.key] = held
        self._bytes += held.nbytes
        while self._bytes > self._most_bytes and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes


def laid_out(
    features: np.ndarray, layout: Layout | None, newline: np.ndarray | None, dtype: np.dtype
) -> np.ndarray:
    """[n, D]: what stands for a picture whose tiles have `features` [tiles, N, D]."""
    rows = features.reshape(-1, features.shape[-1])
    if layout is None:
        return rows
    if newline is not None:
        rows = np.concatenate([rows, newline[None].astype(dtype)])

    def taken(slots: np.ndarray) -> np.ndarray:
        return rows[np.where(slots == NEWLINE, len(rows) - 1, slots)]

    if layout.corners is None:
        return taken(layout.slots)
    slots, weights = layout.corners
    mixed = sum(taken(slots[..., i]).astype(np.float32) * weights[..., i, None] for i in range(4))
    return mixed.astype(dtype)
