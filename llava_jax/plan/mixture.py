"""The records that `plan` assumes where it opens none, and what rows of them hold: by the planner that training has."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llava_jax.data import planner

FRAME = 42  # tokens of the v1 template around a record's first question
SAMPLES = 2 * planner.WINDOW
TILES = (512, 384, 256, 128)  # sides of attention's tiles


class Part(NamedTuple):
    """Records of one kind; the tokens of their turns are a log-normal's of this median and sigma."""

    records: int
    median: int
    sigma: float
    pictured: bool = True


# LLaVA-1.5's 665k. The counts are those of the paper, table 7; the lengths are guessed from each part's turns.
LLAVA = (
    Part(57_669, 230, 0.45),  # instruct: conversation
    Part(23_240, 130, 0.3),  # instruct: detail
    Part(76_803, 190, 0.35),  # instruct: reasoning
    Part(82_783, 85, 0.5),  # VQAv2, several questions a record
    Part(72_140, 200, 0.8),  # GQA, 13 questions on average
    Part(8_998, 30, 0.5),  # OK-VQA
    Part(80_000, 120, 0.5),  # OCR-VQA
    Part(66_160, 55, 0.3),  # A-OKVQA, one question with its choices
    Part(21_953, 80, 0.5),  # TextCaps
    Part(48_447, 150, 1.0),  # RefCOCO
    Part(86_417, 350, 0.7),  # Visual Genome
    Part(40_688, 1000, 0.9, pictured=False),  # ShareGPT, often longer than a row
)
CAPTIONS = (Part(558_128, 27, 0.4),)  # of stage 1: 29 tokens on average, after the picture


class Rows(NamedTuple):
    """What an average row of a step holds.

    pairs: (query, key) pairs of the same sample under the causal mask.
    tile_shares: {side: share of attention's tiles on or below the diagonal that hold such a pair}.
    """

    samples: float
    tokens: float
    pairs: float
    images: float
    tile_shares: Mapping[int, float]


def records(parts: tuple[Part, ...], features: int, frame: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """int [2, n]: tokens of records in random order, and whether each has a picture of so many features."""
    rng, total, columns = np.random.default_rng(seed), sum(part.records for part in parts), []
    for part in parts:
        text = rng.lognormal(np.log(part.median), part.sigma, round(part.records * samples / total)).astype(int)
        columns.append(np.stack([part.pictured * features + frame + text, np.full(len(text), part.pictured)]))
    drawn = np.concatenate(columns, axis=1)
    return drawn[:, rng.permutation(drawn.shape[1])]


@functools.cache
def rows(
    captions: bool, features: int, images: int, mean: int | None, longest: int, row_tokens: int, rows_per_group: int,
    images_per_group: int, packed: bool,
) -> Rows:  # fmt: skip
    """Rows of one record each, or packed.

    Args:
      captions: records of stage 1, else of LLaVA-1.5's mixture.
      features, images: of a record's picture; its tiles are images.
      mean: tokens of a record; None: as they come.
      longest: tokens of a sample; what a record has beyond is cut.
    """
    tokens, pictured = records(*(CAPTIONS, features, 0) if captions else (LLAVA, features, FRAME))
    if mean is not None:
        tokens = np.maximum(1, np.rint(tokens * mean / tokens.mean())).astype(int)
    tokens, images_each = np.minimum(tokens, longest), np.minimum(pictured * images, images_per_group)
    if packed:
        generator = np.random.RandomState(0)
        plan = planner.plan(tokens, images_each, row_tokens, rows_per_group, images_per_group, generator)
        lengths, starts = tokens[plan.samples], plan.starts
    else:
        lengths, starts = tokens, np.arange(len(tokens) + 1)
    count = len(starts) - 1
    shares = {tile: tile_share(lengths, starts, row_tokens, tile) if packed else 1.0
              for tile in TILES if row_tokens % tile == 0}  # fmt: skip
    sums = (len(lengths), lengths.sum(), (lengths * (lengths + 1) // 2).sum(), images_each.sum())
    return Rows(*(float(total) / count for total in sums), shares)


def tile_share(lengths: np.ndarray, starts: np.ndarray, row_tokens: int, tile: int) -> float:
    """The share of tiles on or below the diagonal in which a query sees a key.

    Row r holds samples of lengths[starts[r] : starts[r + 1]], one after the other, then padding, which sees itself.
    """
    places, seen = np.arange(0, row_tokens, tile), 0
    for first, last in zip(starts, starts[1:]):
        begins = np.append(0, np.cumsum(lengths[first:last]))
        begins = begins[np.searchsorted(begins, places, side="right") - 1]  # of the sample at each tile's first query
        seen += int(np.sum(places // tile - begins // tile + 1))
    return seen / ((len(starts) - 1) * len(places) * (len(places) + 1) // 2)
