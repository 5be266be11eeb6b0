"""The contract between the host that lays tokens and pictures out and the device that trains on them.

`Example` is one conversation in tokens; `Batch` is one global step. Every other package agrees on these two and on
nothing else: the host decides where each image feature goes, the device only gathers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_jax.errors import UsageError


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
    images: uint8 [H, W, 3] each, resized to the tower's size; one for each span (empty if not opened).
    id: the record's own id, for messages.
    weight: how much each of its targets counts, relative to those of others.

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


class Batch(NamedTuple):
    """One global step: B rows of T tokens; R = B / G neighbouring rows share one pool of I images.

    What a row means travels with it: the host decides how much each target counts (1 for a mean over all tokens, 1 / n
    in a group of n tokens for a mean of groups' means), and the device knows one rule, whatever the mesh and the order
    of rows: loss = sum(weights * cross-entropy) / sum(weights) over the whole step.

    A NamedTuple, so it is a JAX pytree without importing jax. N is the number of features an image
    gives after the connector.
    """

    tokens: np.ndarray  # int32 [B, T]: input ids; any valid id where an image feature goes
    targets: np.ndarray  # int32 [B, T]: the next id inside the same sample (already shifted)
    weights: np.ndarray  # float32 [B, T]: how much the target counts; 0: not supervised, or a sample's last position
    positions: np.ndarray  # int32 [B, T]: position inside its own sample, restarting at each packed sample
    segments: np.ndarray  # int32 [B, T]: sample number within the row, from 1; 0 is padding
    image_slots: np.ndarray  # int32 [B, T]: row i * N + p of this group's features, or -1; I * N is image_newline
    pixels: np.ndarray  # uint8 [G, I, H, W, 3]: the group's pictures, normalised on the device; I >= 1 always


class Field(NamedTuple):
    """Shape and dtype of one field of a batch; accepted wherever only these two are read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def spec(rows: int, row_tokens: int, groups: int, images_per_group: int, image_size: int) -> Batch:
    """A `Batch` of `Field`s: all shapes and dtypes, known without data.

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
    return Batch(
        tokens=ids, targets=ids, weights=Field(ids.shape, np.dtype(np.float32)), positions=ids, segments=ids,
        image_slots=ids, pixels=Field((groups, images_per_group, image_size, image_size, 3), np.dtype(np.uint8)),
    )  # fmt: skip
