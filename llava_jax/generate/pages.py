"""Which pages of the key/value cache are whose, and what of them a later prompt may take over: exact beginnings only.

A page of a prompt is known by a digest of all that it rests on, tokens and pixels from the first position on. Pages
that nobody uses stay until they are needed, the longest unused first.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llava_jax.batch import Example, Layout
from llava_jax.models.paged import PAGE


class PromptImage(NamedTuple):
    """A picture in a prompt: its features stand at positions start .. start + length - 1.

    key: a digest of the tiles' pixels and their layout. tiles: uint8 [H, W, 3] each.
    """

    start: int
    length: int
    key: bytes
    tiles: tuple[np.ndarray, ...]
    layout: Layout | None


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers.

    tokens: int32 [n], any id where an image feature goes. digests: of every whole page.
    """

    tokens: np.ndarray
    images: tuple[PromptImage, ...] = ()
    digests: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", tuple(_digests(self.tokens, self.images)))

    @property
    def reusable(self) -> int:
        """Pages that need not be computed where they are known; the last token's always is, for what it predicts."""
        return (len(self.tokens) - 1) // PAGE


def prompt_of(example: Example) -> Prompt:
    """The prompt of an encoded conversation with its pictures."""
    tiles, images = iter(example.images), list[PromptImage]()
    for span, layout in zip(example.image_spans, example.layouts or (None,) * len(example.image_spans), strict=True):
        pixels = tuple(next(tiles) for _ in range(1 if layout is None else layout.tiles))
        digest = hashlib.sha256(b"".join(tile.tobytes() for tile in pixels))
        if layout is not None:
            arrays = [layout.slots, *(() if layout.corners is None else layout.corners)]
            digest.update(b"".join(array.tobytes() for array in arrays))
        images.append(PromptImage(span.start, span.length, digest.digest(), pixels, layout))
    return Prompt(example.tokens, tuple(images))


def _digests(tokens: np.ndarray, images: Sequence[PromptImage]) -> Iterator[bytes]:
    chain = b""
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        digest = hashlib.sha256(chain + tokens[start : start + PAGE].tobytes())
        for one in images:
            if one.start < start + PAGE and one.start + one.length > start:
                digest.update(struct.pack("<qq", one.start, one.length) + one.key)
        chain = digest.digest()
        yield chain


class Pages:
    """The pages of a pool. Page 0 belongs to nobody: idle rows write there."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, 0, -1))
        self._uses = [0] * count
        self._digest: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, used by nobody; the longest unused first

    @property
    def available(self) -> int:
        """Pages that can be had."""
        return len(self._free) + len(self._idle)

    def reserve(self, prompt: Prompt, count: int) -> tuple[list[int], int] | None:
        """`count` pages for a row that begins with `prompt`, and how many of them hold its beginning already; None
        where there are not so many. `release` gives them back."""
        known = list[int]()
        for digest in prompt.digests[: prompt.reusable]:
            if digest not in self._known:
                break
            known.append(self._known[digest])
        if count - len(known) > self.available - sum(page in self._idle for page in known):
            return None
        for page in known:
            self._uses[page] += 1
            self._idle.pop(page, None)
        return known + [self._take() for _ in range(count - len(known))], len(known)

    def publish(self, page: int, digest: bytes) -> None:
        """Says that a reserved page is written, whole, with what the digest stands for."""
        if digest not in self._known:
            self._known[digest], self._digest[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """Gives the pages of a row back; the end of a beginning is forgotten first."""
        for page in reversed(pages):
            self._uses[page] -= 1
            if self._uses[page]:
                continue
            if page in self._digest:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._digest.pop(page)]
        self._uses[page] = 1
        return page
