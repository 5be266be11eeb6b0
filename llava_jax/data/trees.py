"""Rows of one picture: records that begin alike, up to their last picture, lie in a row as the branches of a tree."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_jax.batch import BRANCHES, Example
from llava_jax.prompt.conversation import Video


class Prefixes(NamedTuple):
    """Of each record the tokens that it may share, and what they are: records of an equal key share. 0, 0: none."""

    tokens: np.ndarray  # int [n]
    keys: np.ndarray  # int64 [n]


def prefix(example: Example) -> int:
    """Tokens up to the end of the last picture; 0 where one of them, or the one after them, is supervised.

    The last of them predicts a token of each branch, and has one place for a target: none of these may count.
    """
    end = sum(example.image_spans[-1]) if example.image_spans else 0
    return end if end < len(example.tokens) and not example.learned[: end + 1].any() else 0


def column(example: Example, images: Sequence[Any]) -> tuple[int, int, int]:
    """(`prefix`, 32 bits of its key, 32 more) for the index; 0, 0, 0 where a picture has neither path nor bytes."""
    end, names = prefix(example), [_name(image) for image in images]
    if not end or None in names:
        return 0, 0, 0
    digest = hashlib.blake2b(example.tokens[:end].tobytes() + repr(names).encode(), digest_size=8).digest()
    return end, *np.frombuffer(digest, np.int32).tolist()


def _name(image: Any) -> tuple[str, str] | None:
    """What tells a picture from others; None: nothing does."""
    if isinstance(image, Video):
        name = _name(image.source)
        return name and ("video", str(name))
    if isinstance(image, bytes):
        return ("bytes", hashlib.sha256(image).hexdigest()) if image else None
    return ("path", os.fspath(image)) if isinstance(image, str | os.PathLike) else None


def prefixes(measures: np.ndarray, root: os.PathLike | None, sample_tokens: int) -> Prefixes:
    """Of a source's records, by `index.measures`.

    root: the image folder; the same path in another one is another picture. sample_tokens: what samples are cut at.
    """
    folder = hashlib.blake2b(str(root).encode(), digest_size=8).digest()
    tokens, ends = measures[:, 0], measures[:, 2]
    keys = np.ascontiguousarray(measures[:, 3:]).view(np.int64)[:, 0] ^ np.frombuffer(folder, np.int64)
    shared = (ends > 0) & (ends < np.minimum(tokens, sample_tokens))
    return Prefixes(ends * shared, keys * shared)


def saved(prefixes: Prefixes) -> int:
    """Tokens that are not repeated where records of a key are one tree."""
    _, first = np.unique(prefixes.keys, return_index=True)
    return int(prefixes.tokens.sum() - prefixes.tokens[first].sum())


def together(
    tokens: np.ndarray, prefixes: Prefixes, records: np.ndarray, row_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Trees of samples 0 .. n - 1: (the samples, int [n], where each tree begins in them and the end, int [trees + 1]).

    Samples of a key come together, in their order, at the place of the one whose record has the lowest number: the
    place of the first would have most trees come early in a random order, and the end of an epoch be another mixture.
    Of a record that comes more than once each further sample is in a further tree, and what is longer than a row is
    divided.

        records   2 1 3 4 0        row_tokens=16
        tokens    9 8 9 7 9
        prefixes  5 5 5 - 5        trees  2 | 3 | 0 1 4      of 9, 7 and 9 + 3 + 4 tokens
        keys      A A B - A
    """
    places = np.arange(len(tokens))
    order = np.argsort(records, kind="stable")
    turns = np.empty_like(places)
    turns[order] = places - np.maximum.accumulate(np.where(np.diff(records[order], prepend=-1) != 0, places, 0))
    alone = np.where(prefixes.keys == 0, places + 1, 0)
    order = np.lexsort((places, turns, alone, prefixes.keys))
    same = [np.diff(x[order], prepend=0) == 0 for x in (prefixes.keys, alone, turns)]
    begins = _divided((~np.all(same, axis=0)).tolist(), tokens[order].tolist(), prefixes.tokens[order].tolist(),
                      row_tokens)  # fmt: skip
    sizes = np.diff(begins, append=len(order))
    lowest = np.minimum.reduceat(records[order] * len(order) + order, begins) % len(order)
    by_place = np.argsort(lowest)
    return order[ranges(begins[by_place], sizes[by_place])], np.append(0, np.cumsum(sizes[by_place]))


def _divided(new: Sequence[bool], tokens: Sequence[int], prefixes: Sequence[int], row_tokens: int) -> np.ndarray:
    """Where trees begin, of samples in the order of their keys."""
    begins, left = list[int](), 0
    for place, (first, total, shared) in enumerate(zip(new, tokens, prefixes)):
        left -= total - shared
        if first or left < 0 or not place or place - begins[-1] == BRANCHES:
            begins.append(place)
            left = row_tokens - total
    return np.array(begins)


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... of so many each, one after another."""
    return np.arange(sizes.sum()) + np.repeat(starts - np.append(0, np.cumsum(sizes)[:-1]), sizes)


def repeated(keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """bool [n]: of the samples of rows, those whose prefix stands there already. starts: as in `planner.Plan`."""
    again = np.append(False, (keys[1:] == keys[:-1]) & (keys[1:] != 0))
    again[starts[starts < len(keys)]] = False
    return again
