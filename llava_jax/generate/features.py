"""Features of pictures on the host, so that a picture that is shown again does not pass through the tower again."""

import itertools
from collections import OrderedDict

import numpy as np

from llava_jax.batch import laid_out
from llava_jax.generate.pages import Shown


class Features:
    """Pictures' features, laid out as they stand in a prompt, [length, D]; the longest unused go first.

    most_bytes: of those that are kept. dtype: in which they are kept, the model's.
    """

    def __init__(self, most_bytes: int, dtype: np.dtype) -> None:
        self._most_bytes, self._dtype = most_bytes, dtype
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

    def add(self, shown: Shown, index: int, features: np.ndarray, newline: np.ndarray) -> None:
        """Takes the features [N, D] of a tile, and the model's `image_newline` [1, D] or [0, D]."""
        found = self._wanted[shown.key][1]
        found[index] = features
        if any(one is None for one in found):
            return
        del self._wanted[shown.key]
        rows = np.stack(found)
        held = (rows[0] if shown.layout is None else laid_out(rows, newline, shown.layout)).astype(self._dtype)
        self._held[shown.key] = held
        self._bytes += held.nbytes
        while self._bytes > self._most_bytes and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
