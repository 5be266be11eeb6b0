"""How examples are laid into the rows of a `Batch`: all ragged arithmetic, in numpy, to be checked by eye."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from llava_jax.batch import AnyBatch, Batch, Corners, Example, ResizedBatch, alone, lay_images
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
    resizes: bool = False, sample_tokens: int = 0,
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
    for example, group, row, segment, start, image in _places(kept):
        n, images = len(example.tokens), example.tiles
        if start + n > row_tokens or image + images > images_per_group:
            raise UsageError(
                f"record {example.id!r} fills its row to {start + n} of {row_tokens} tokens and its group to "
                f"{image + images} of {images_per_group} images: want a plan that keeps within both"
            )
        tokens[row, start : start + n] = example.tokens
        targets[row, start : start + n - 1] = example.tokens[1:]
        weights[row, start : start + n - 1] = example.learned[1:] * np.float32(example.weight)
        positions[row, start : start + n] = np.arange(n)
        segments[row, start : start + n] = segment
        lay_images(example, slots[row, start:], corners and Corners(*(x[row, start:] for x in corners)), image,
                   images_per_group)  # fmt: skip
        for i, picture in enumerate(example.images, image):
            pixels[group, i] = picture
    batch = Batch(tokens, targets, weights, positions, segments, slots, pixels)
    return (ResizedBatch(*batch, corners) if corners else batch), lost


class _Place(NamedTuple):
    """Where an example goes: its first token is at `start` of `row`, its first image is `image` of `group`."""

    example: Example
    group: int
    row: int
    segment: int
    start: int
    image: int


def _places(groups: Sequence[Sequence[Sequence[tuple[Example, int]]]]) -> Iterator[_Place]:
    """Every example that has tokens, one after another within its row."""
    number = 0
    for group, rows in enumerate(groups):
        image = 0
        for row in rows:
            start = 0
            examples = [example for example, _ in row if len(example.tokens)]
            for segment, example in enumerate(examples, 1):
                yield _Place(example, group, number, segment, start, image)
                start, image = start + len(example.tokens), image + example.tiles
            number += 1
