"""Features of pictures on the host, so that a picture that is shown again does not pass through the tower again."""

from collections import OrderedDict
from collections.abc import Set

import numpy as np

from llava_jax.batch import laid_out
from llava_jax.generate.pages import PromptImage


class Features:
    """Pictures' features, laid out as they stand in a prompt, [length, D]; the longest unused go first.

    most_bytes: of those that are kept. dtype: in which they are kept, the model's.
    """

    def __init__(self, most_bytes: int, dtype: np.dtype) -> None:
        self._most_bytes, self._dtype = most_bytes, dtype
        self._bytes = 0
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._unseen: OrderedDict[bytes, tuple[PromptImage, list[np.ndarray | None]]] = OrderedDict()

    def find(self, image: PromptImage) -> np.ndarray | None:
        """The features of a picture; None where they are not there, whose tiles are then `pending`."""
        if image.key in self._features:
            self._features.move_to_end(image.key)
            return self._features[image.key]
        if image.key not in self._unseen:
            self._unseen[image.key] = image, [None] * len(image.tiles)
        return None

    def forget_unseen(self, keys: Set[bytes]) -> None:
        """Forgets pictures whose features are wanted, but those of these keys."""
        for key in self._unseen.keys() - keys:
            del self._unseen[key]

    def pending(self, image: PromptImage) -> list[tuple[PromptImage, int, np.ndarray]]:
        """The tiles of a picture whose features are wanted: the picture, which of its tiles, and its pixels."""
        parts = self._unseen.get(image.key, (image, ()))[1]
        return [(image, index, image.tiles[index]) for index, features in enumerate(parts) if features is None]

    def add(self, image: PromptImage, index: int, features: np.ndarray, newline: np.ndarray) -> None:
        """Takes the features [N, D] of a tile, and the model's `image_newline` [1, D] or [0, D]."""
        parts = self._unseen[image.key][1]
        parts[index] = features
        if any(one is None for one in parts):
            return
        del self._unseen[image.key]
        tiles = np.stack(parts)
        rows = (tiles[0] if image.layout is None else laid_out(tiles, newline, image.layout)).astype(self._dtype)
        self._features[image.key] = rows
        self._bytes += rows.nbytes
        while self._bytes > self._most_bytes and len(self._features) > 1:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
