"""The records that `plan` assumes where it opens none, and what rows of them hold: by the planner that training has."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llava_jax.data import planner, trees

FRAME = 42  # tokens of the v1 template around a record's first question
BEFORE = 35  # of them, before the picture
SAMPLES = 2 * planner.WINDOW
TILES = (512, 384, 256, 128, 64)  # sides of attention's tiles


class Part(NamedTuple):
    """Records of one kind; the tokens of their turns are a log-normal's of this median and sigma."""

    records: int
    median: int
    sigma: float
    pictured: bool = True
    coco: bool = False


# LLaVA-1.5's 665k. The counts are those of the paper, table 7; the lengths are guessed from each part's turns. Pictures
# of COCO are those of train2017, 118,287: each is taken to have records, and as many as any other, which is the least
# that 364,100 records can share. Pictures of the other parts are taken to have one record each.
PICTURES = 118_287
LLAVA = (
    Part(57_669, 230, 0.45, coco=True),  # instruct: conversation
    Part(23_240, 130, 0.3, coco=True),  # instruct: detail
    Part(76_803, 190, 0.35, coco=True),  # instruct: reasoning
    Part(82_783, 85, 0.5, coco=True),  # VQAv2, several questions a record
    Part(72_140, 200, 0.8),  # GQA, 13 questions on average
    Part(8_998, 30, 0.5, coco=True),  # OK-VQA
    Part(80_000, 120, 0.5),  # OCR-VQA
    Part(66_160, 55, 0.3, coco=True),  # A-OKVQA, one question with its choices
    Part(21_953, 80, 0.5),  # TextCaps
    Part(48_447, 150, 1.0, coco=True),  # RefCOCO
    Part(86_417, 350, 0.7),  # Visual Genome
    Part(40_688, 1000, 0.9, pictured=False),  # ShareGPT, often longer than a row
)
CAPTIONS = (Part(558_128, 27, 0.4),)  # of stage 1: 29 tokens on average, after the picture


class Rows(NamedTuple):
    """What an average row of a step holds.

    tokens, images: those that samples share once. all_tokens, all_images: of each sample whole.
    pairs: (query, key) pairs of the same sample under the causal mask, those of a shared prefix once.
    tile_shares: {side: share of attention's tiles on or below the diagonal that hold such a pair}.
    """

    samples: float
    tokens: float
    pairs: float
    images: float
    all_tokens: float
    all_images: float
    tile_shares: Mapping[int, float]


def records(parts: tuple[Part, ...], features: int, frame: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """int [3, n]: tokens of records in random order, whether each has a picture of so many features, and the number of
    its picture; 0: no other record has it."""
    rng, total, columns = np.random.default_rng(seed), sum(part.records for part in parts), []
    for part in parts:
        text = rng.lognormal(np.log(part.median), part.sigma, round(part.records * samples / total)).astype(int)
        kinds = [np.full(len(text), kind) for kind in (part.pictured, part.coco)]
        columns.append(np.stack([part.pictured * features + frame + text, *kinds]))
    drawn = np.concatenate(columns, axis=1)
    drawn = drawn[:, rng.permutation(drawn.shape[1])]
    drawn[2] *= 1 + np.cumsum(drawn[2]) % round(PICTURES * samples / total)
    return drawn


@functools.cache
def rows(
    captions: bool, features: int, images: int, mean: int | None, longest: int, row_tokens: int, rows_per_group: int,
    images_per_group: int, packed: bool, share_images: bool = False,
) -> Rows:  # fmt: skip
    """Rows of one record each, or packed.

    Args:
      captions: records of stage 1, else of LLaVA-1.5's mixture.
      features, images: of a record's picture; its tiles are images.
      mean: tokens of a record; None: as they come.
      longest: tokens of a sample; what a record has beyond is cut.
    """
    tokens, pictured, keys = records(*(CAPTIONS, features, 0) if captions else (LLAVA, features, FRAME))
    if mean is not None:
        tokens = np.maximum(1, np.rint(tokens * mean / tokens.mean())).astype(int)
    tokens, images_each = np.minimum(tokens, longest), np.minimum(pictured * images, images_per_group)
    keys = keys * (share_images and packed) * (BEFORE + features < tokens)
    prefixes, numbers = trees.Prefixes((BEFORE + features) * (keys > 0), keys), np.arange(len(tokens))
    if packed:
        generator = np.random.RandomState(0)
        numbers, starts = planner.plan_trees(tokens, images_each, prefixes, numbers, row_tokens, rows_per_group,
                                             images_per_group, generator)  # fmt: skip
    else:
        starts = np.arange(len(tokens) + 1)
    lengths, prefix, count = tokens[numbers], prefixes.tokens[numbers], len(starts) - 1
    again = trees.repeated(keys[numbers], starts)
    ends = key_ends(lengths, prefix, again, starts, row_tokens)
    shares = {tile: tile_share(ends, tile) if packed else 1.0 for tile in TILES if row_tokens % tile == 0}
    pairs, shared = lengths * (lengths + 1) // 2, prefix * again
    sums = (len(lengths), (lengths - shared).sum(), (pairs - shared * (shared + 1) // 2).sum(),
            (images_each[numbers] * ~again).sum(), lengths.sum(), images_each.sum())  # fmt: skip
    return Rows(*(float(total) / count for total in sums), shares)


def key_ends(
    lengths: np.ndarray, prefixes: np.ndarray, again: np.ndarray, starts: np.ndarray, row_tokens: int
) -> np.ndarray:
    """int [rows, row_tokens]: the first query behind each key that no longer sees it, as `models.tiled.key_ends`.

    Row r holds samples starts[r] .. starts[r + 1] - 1, of these lengths, then padding, which sees itself.

    Args:
      prefixes: of their tokens, those that others share. again: whether those stand in the row already.
    """
    ends = np.full((len(starts) - 1, row_tokens), row_tokens)
    for row, first, last in zip(ends, starts, starts[1:]):
        new, prefix = ~again[first:last], prefixes[first:last]
        own = np.cumsum(lengths[first:last] - prefix * ~new)  # the end of each sample
        trees_ends = own[np.append(np.flatnonzero(new)[1:], len(new)) - 1] if len(new) else own
        pieces = np.stack([prefix * new, lengths[first:last] - prefix], axis=1).ravel()
        values = np.stack([trees_ends[np.cumsum(new) - 1], own], axis=1).ravel()
        row[: pieces.sum()] = np.repeat(values, pieces)
    return ends


def tile_share(ends: np.ndarray, tile: int) -> float:
    """The share of tiles on or below the diagonal in which a query sees a key, by `key_ends`."""
    last = ends.reshape(len(ends), -1, tile).max(axis=2)
    tiles = last.shape[1]
    return float((-(-last // tile) - np.arange(tiles)).sum() / (len(ends) * tiles * (tiles + 1) // 2))
