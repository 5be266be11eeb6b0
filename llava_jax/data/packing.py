"""How examples are laid into the rows of a `Batch`: all ragged arithmetic, in numpy, to be checked by eye."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from llava_jax.batch import BRANCHES, TREES, AnyBatch, Batch, Corners, Example, ResizedBatch, alone, lay_images
from llava_jax.data import trees
from llava_jax.errors import UsageError


def cut(example: Example, row_tokens: int) -> tuple[Example, int]:
    """The first `row_tokens` tokens of an example, and how many of its targets were lost.

    An image that would be cut is dropped whole together with what follows.

        tokens   <s> [0 0 0 0] What ? A cat </s>          cut at 8: all but "cat </s>", 2 targets lost
        learned   .   . . . .   .   . x  x   x            cut at 3: <s> only, 3 targets lost
    """
    end = min(len(example.tokens), row_tokens)
    for span in example.image_spans:
        if span.start < end < span.start + span.length:
            end = span.start
    if end == len(example.tokens):
        return example, 0
    spans = tuple(span for span in example.image_spans if span.start < end)
    kept = Example(example.tokens[:end], example.learned[:end], spans, (), example.id, example.weight,
                   example.layouts[: len(spans)])  # fmt: skip
    return replace(kept, images=example.images[: kept.tiles]), int(example.learned[end:].sum())


def padded(
    examples: Sequence[Example], row_tokens: int, images_per_group: int, image_size: int, resizes: bool = False
) -> tuple[AnyBatch, int]:
    """One example a row, each row a group of its own: what `packed` makes of it."""
    return packed([[[example]] for example in examples], row_tokens, images_per_group, image_size, resizes)


def packed(
    groups: Sequence[Sequence[Sequence[Example]]], row_tokens: int, images_per_group: int, image_size: int,
    resizes: bool = False, sample_tokens: int = 0, share_images: bool = False,
) -> tuple[AnyBatch, int]:  # fmt: skip
    """Groups of rows of examples as a batch, padded on the right, and the number of targets that cutting lost.

    Every group has the same number of rows; a row without examples is padding: weight 0, segment 0 everywhere. An
    example longer than a row is cut, one without tokens takes nothing. Pixels without an image are 0. Of a picture of
    several tiles each is an image.

        one group of one row of two examples, row_tokens=10, images of N=2 features:
        example.tokens    1  0  0  5  6  7 | 1  0  0  8         example.learned  . . . . x x | . . . x
        tokens            1  0  0  5  6  7   1  0  0  8
        targets           0  0  5  6  7  0   0  0  8  0         the next id; 0 at an example's last position
        weights           0  0  0  1  1  0   0  0  1  0         example.weight where the next id is learned
        positions         0  1  2  3  4  5   0  1  2  3
        segments          1  1  1  1  1  1   2  2  2  2
        image_slots      -1  0  1 -1 -1 -1  -1  2  3 -1         the group's image i, feature p: i * N + p

    With `share_images` neighbours with the same prefix (`trees.prefix`) and pictures are a tree: the first writes it.
    The prefix is branch 0 of their number n, and what each has behind it is a branch, here n + b, n + 2b, ...

        the second example of that row as 1 0 0 9 8, with the picture of the first, row_tokens=10:
        tokens            1  0  0  5  6  7  9  8             positions   0  1  2  3  4  5  3  4
        targets           0  0  5  6  7  0  8  0             segments    1  1  1 1+b .. .. 1+2b ..     b: batch.TREES
        weights           0  0  0  1  1  0  1  0             image_slots -1 0  1 -1 -1 -1 -1 -1

    Args:
      resizes: the model resizes features of large pictures; the batch is a `ResizedBatch`.
      sample_tokens: what an example is cut at; 0: the row.

    Raises:
      ValueError: the examples of a row are longer than it, or a group holds more images than `images_per_group`.
    """
    kept = [[[cut(example, sample_tokens or row_tokens) for example in row] for row in group] for group in groups]
    lost = sum(lost for group in kept for row in group for _, lost in row)
    rows = sum(map(len, groups))
    tokens, targets, positions, segments, slots = np.zeros((5, rows, row_tokens), np.int32)
    weights = np.zeros((rows, row_tokens), np.float32)
    pixels = np.zeros((len(groups), images_per_group, image_size, image_size, 3), np.uint8)
    slots[:] = -1
    corners = alone(slots) if resizes else None
    for example, group, row, segment, start, image, prefix, shared in _places(kept, share_images):
        n, images = len(example.tokens) - shared, example.tiles * (not shared)
        if start + n > row_tokens or image + images > images_per_group:
            raise UsageError(
                f"record {example.id!r} fills its row to {start + n} of {row_tokens} tokens and its group to "
                f"{image + images} of {images_per_group} images: want a plan that keeps within both"
            )
        tokens[row, start : start + n] = example.tokens[shared:]
        targets[row, start : start + n - 1] = example.tokens[shared + 1 :]
        weights[row, start : start + n - 1] = example.learned[shared + 1 :] * np.float32(example.weight)
        positions[row, start : start + n] = np.arange(shared, shared + n)
        segments[row, start : start + n] = segment
        if shared:
            continue
        segments[row, start : start + prefix] %= TREES
        lay_images(example, slots[row, start:], corners and Corners(*(x[row, start:] for x in corners)), image,
                   images_per_group)  # fmt: skip
        for i, picture in enumerate(example.images, image):
            pixels[group, i] = picture
    batch = Batch(tokens, targets, weights, positions, segments, slots, pixels)
    return (ResizedBatch(*batch, corners) if corners else batch), lost


class _Place(NamedTuple):
    """Where an example goes: its first token is at `start` of `row`, its first image is `image` of `group`.

    prefix: tokens that others may share. shared: those of them that, with its images, stand in its tree already.
    """

    example: Example
    group: int
    row: int
    segment: int
    start: int
    image: int
    prefix: int
    shared: int


def _places(groups: Sequence[Sequence[Sequence[tuple[Example, int]]]], share_images: bool) -> Iterator[_Place]:
    """Every example that has tokens, one after another within its row."""
    number = 0
    for group, rows in enumerate(groups):
        image = 0
        for row in rows:
            start, segment, before = 0, 0, None
            for example in (example for example, _ in row if len(example.tokens)):
                prefix = trees.prefix(example) if share_images else 0
                shared = prefix * (before is not None and segment < BRANCHES * TREES and _shares(before, example))
                segment = segment + TREES if shared else segment % TREES + 1 + TREES * (prefix > 0)
                before = example
                yield _Place(example, group, number, segment, start, image, prefix, shared)
                start, image = start + len(example.tokens) - shared, image + example.tiles * (not shared)
            number += 1


def _shares(one: Example, other: Example) -> bool:
    """Whether both have the same prefix and pictures."""
    end, layouts = trees.prefix(one), zip(one.layouts, other.layouts)
    pairs = [(one.tokens[:end], other.tokens[:end]), *((a.slots, b.slots) for a, b in layouts),
             *zip(one.images, other.images)]  # fmt: skip
    alike = end == trees.prefix(other) and one.image_spans == other.image_spans and one.tiles == other.tiles
    return alike and all(np.array_equal(a, b) for a, b in pairs)
