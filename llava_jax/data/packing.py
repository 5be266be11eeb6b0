"""How examples are laid into the rows of a `Batch`: all ragged arithmetic, in numpy, to be checked by eye."""

from collections.abc import Sequence

import numpy as np

from llava_jax.batch import Batch, Example


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
    kept = Example(example.tokens[:end], example.learned[:end], spans, example.images[: len(spans)], example.id)
    return kept, int(example.learned[end:].sum())


def padded(
    examples: Sequence[Example], row_tokens: int, images_per_group: int, image_size: int
) -> tuple[Batch, int]:
    """One example a row, cut or padded on the right (G == B), and the number of targets that cutting lost.

    An example without tokens gives a row of padding: weight 0, segment 0 everywhere. Pixels without an image are 0.

        one example, row_tokens=8, an image of N=2 features:
        example.tokens    1  0  0  5  6  7               example.learned  .  .  .  .  x  x
        tokens            1  0  0  5  6  7  0  0
        targets           0  0  5  6  7  0  0  0         the next id; 0 at the last position
        weights           0  0  0  1  1  0  0  0         1 where the next id is learned
        positions         0  1  2  3  4  5  0  0
        segments          1  1  1  1  1  1  0  0
        image_slots      -1  0  1 -1 -1 -1 -1 -1         image i, feature p: i * N + p

    Raises:
      ValueError: an example holds more images than `images_per_group`.
    """
    ids = np.zeros((5, len(examples), row_tokens), np.int32)
    tokens, targets, positions, segments, slots = ids
    weights = np.zeros((len(examples), row_tokens), np.float32)
    pixels = np.zeros((len(examples), images_per_group, image_size, image_size, 3), np.uint8)
    slots[:] = -1
    lost = 0
    for row, example in enumerate(examples):
        kept, lost_here = cut(example, row_tokens)
        lost += lost_here
        if len(kept.images) > images_per_group:
            raise ValueError(f"record {kept.id!r} has {len(kept.images)} images, a row takes {images_per_group}")
        n = len(kept.tokens)
        tokens[row, :n] = kept.tokens
        targets[row, : max(n - 1, 0)] = kept.tokens[1:]
        weights[row, : max(n - 1, 0)] = kept.learned[1:]
        positions[row, :n] = np.arange(n)
        segments[row, :n] = 1
        for i, span in enumerate(kept.image_spans):
            slots[row, span.start : span.start + span.length] = i * span.length + np.arange(span.length)
        for i, image in enumerate(kept.images):
            pixels[row, i] = image
    return Batch(tokens, targets, weights, positions, segments, slots, pixels), lost
