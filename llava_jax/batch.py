"""The contract between the host that lays tokens and pictures out and the device that trains on them.

`Example` is one conversation in tokens; `Batch` is one global step. Every other package agrees on these two and on
nothing else: the host decides where each image feature goes, the device only gathers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_jax.errors import UsageError

NEWLINE = -2  # in a `Layout`: the model's `image_newline`
# In `Batch.segments`: of a tree n + b * TREES, where b is 0 in the prefix and 1 .. BRANCHES in what samples have behind
# it. A row has at most 2**20 positions.
TREES, BRANCHES = 2**20, 2**11 - 1


class Corners(NamedTuple):
    """Features that are mixed from four: where a picture's features are resized.

    slots: int32 [..., 4]; weights: float32 [..., 4], of sum 1.
    """

    slots: np.ndarray
    weights: np.ndarray


def alone(slots: np.ndarray) -> Corners:
    """Features that are as they are: of `slots` [...] the first corner of weight 1."""
    weights = np.zeros((*slots.shape, 4), np.float32)
    weights[..., 0] = 1
    return Corners(np.repeat(slots[..., None], 4, axis=-1), weights)


class Layout(NamedTuple):
    """Which features of a picture's tiles, or of a video's frames, stand for it, in order.

    tiles: pictures of the tower's size that it is cut into, or frames; features: N, of each.
    slots: int32 [n]: tile * N + p for feature p of a tile, or `NEWLINE`; where features are mixed, the first of four.
    corners: all four; None where none is mixed.
    """

    tiles: int
    features: int
    slots: np.ndarray
    corners: Corners | None = None


def plain(features: int) -> Layout:
    """A picture's features in their own order."""
    return Layout(1, features, np.arange(features, dtype=np.int32))


class Span(NamedTuple):
    """Positions `start .. start + length - 1` of one image's features in a token row."""

    start: int
    length: int


@dataclass(frozen=True)
class Example:
    """One conversation, tokenised and laid out, before it is cut or padded to a row.

    tokens: int32 [T], input ids; 0 where an image feature goes.
    learned: bool [T], True where the token is a target (it is predicted from the position before it).
    image_spans: where each image's features go, in reading order; never overlapping.
    images: uint8 [H, W, 3] each, of the tower's size; the tiles of each span in turn (empty if not opened).
    id: the record's own id, for messages.
    weight: how much each of its targets counts, relative to those of others.
    layouts: of the features of each span; (): each has one image, whose features stand in their own order.

        tokens   <s> A chat ... USER: [0 0 0 0] What is it? ASSISTANT: A cat . </s>
        learned   .  .  .        .     . . . .   .    .  .   .          x  x  x  x
        spans                         (start, 4)
    """

    tokens: np.ndarray
    learned: np.ndarray
    image_spans: tuple[Span, ...]
    images: tuple[np.ndarray, ...]
    id: str
    weight: float | int = 1.0
    layouts: tuple[Layout, ...] = ()

    @property
    def tiles(self) -> int:
        """How many `images` it has, opened or not."""
        return sum(layout.tiles for layout in self.layouts) if self.layouts else len(self.image_spans)


class Batch(NamedTuple):
    """One global step: B rows of T tokens; R = B / G neighbouring rows share one pool of I images.

    What a row means travels with it: the host decides how much each target counts (1 for a mean over all tokens, 1 / n
    in a group of n tokens for a mean of groups' means), and the device knows one rule, whatever the mesh and the order
    of rows: loss = sum(weights * cross-entropy) / sum(weights) over the whole step.

    Samples of one picture may be a tree (`data.share_images`): what they have in common stands once, in front, with
    weight 0 throughout; each sample's own positions see it and themselves, and go on from its end.

    A NamedTuple, so it is a JAX pytree without importing jax. N is the number of features an image
    gives after the connector.
    """

    tokens: np.ndarray  # int32 [B, T]: input ids; any valid id where an image feature goes
    targets: np.ndarray  # int32 [B, T]: the next id inside the same sample (already shifted)
    weights: np.ndarray  # float32 [B, T]: how much the target counts; 0: not supervised, or a sample's last position
    positions: np.ndarray  # int32 [B, T]: position inside its own sample, restarting at each packed sample
    segments: np.ndarray  # int32 [B, T]: number of its sample or tree in the row, from 1; 0 is padding; see `TREES`
    image_slots: np.ndarray  # int32 [B, T]: row i * N + p of this group's features, or -1; I * N is image_newline
    pixels: np.ndarray  # uint8 [G, I, H, W, 3]: the group's pictures or tiles, normalised on the device; I >= 1 always


class ResizedBatch(NamedTuple):
    """A `Batch` for a model that resizes the features of large pictures, or of a video's frames."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    image_slots: np.ndarray  # of each position with an image feature the first of its corners
    pixels: np.ndarray
    corners: Corners  # [B, T, 4]: the features that are mixed there


AnyBatch = Batch | ResizedBatch


class Field(NamedTuple):
    """Shape and dtype of one field of a batch; accepted wherever only these two are read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def spec(
    rows: int, row_tokens: int, groups: int, images_per_group: int, image_size: int, resizes: bool = False
) -> AnyBatch:
    """A `Batch` of `Field`s: all shapes and dtypes, known without data.

    resizes: of a `ResizedBatch`.

    Raises:
      ValueError: `groups` does not divide `rows`, or a size is below 1.
    """
    sizes = {"rows": rows, "row_tokens": row_tokens, "groups": groups,
             "images_per_group": images_per_group, "image_size": image_size}  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"batch {name}={value}: want at least 1 (text-only groups still carry one blank image)")
    if rows % groups:
        raise UsageError(f"batch rows={rows} do not divide into groups={groups}: choose rows as a multiple of groups")
    ids = Field((rows, row_tokens), np.dtype(np.int32))
    found = Batch(
        tokens=ids, targets=ids, weights=Field(ids.shape, np.dtype(np.float32)), positions=ids, segments=ids,
        image_slots=ids, pixels=Field((groups, images_per_group, image_size, image_size, 3), np.dtype(np.uint8)),
    )  # fmt: skip
    if not resizes:
        return found
    four = Corners(*(Field((rows, row_tokens, 4), np.dtype(kind)) for kind in (np.int32, np.float32)))
    return ResizedBatch(*found, four)


def lay_images(
    example: Example, slots: np.ndarray, corners: Corners | None, first: int, images_per_group: int
) -> None:
    """Writes where an example's image features come from into `slots` [n], and into `corners` [n, 4] if there are any.

    first: the number of its first tile among the `images_per_group` of its group.
    """
    layouts = example.layouts or [plain(length) for _, length in example.image_spans]
    for span, layout in zip(example.image_spans, layouts, strict=True):
        here = slice(span.start, span.start + span.length)
        newline, start = images_per_group * layout.features, first * layout.features
        slots[here] = np.where(layout.slots == NEWLINE, newline, start + layout.slots)
        if corners is not None:
            mixed = layout.corners or alone(layout.slots)
            corners.slots[here] = np.where(mixed.slots == NEWLINE, newline, start + mixed.slots)
            corners.weights[here] = mixed.weights
        first += layout.tiles


def laid_out(tiles: np.ndarray, newline: np.ndarray, layout: Layout) -> np.ndarray:
    """[n, D]: the features of a picture, of those of its tiles [tiles, N, D] and the newline [0 or 1, D]."""
    rows = np.concatenate([tiles.reshape(-1, tiles.shape[-1]), newline])
    slots, weights = layout.corners or alone(layout.slots)
    return (rows[np.where(slots == NEWLINE, len(rows) - 1, slots)] * weights[..., None]).sum(axis=-2)
