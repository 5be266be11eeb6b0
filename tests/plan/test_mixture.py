"""What `plan` assumes of rows is what the planner packs and the kernels visit."""

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import flash
from llava_jax.plan import mixture

LLAVA_ROWS = dict(captions=False, features=576, images=1, mean=None, longest=4096, row_tokens=4096, rows_per_group=2,
                  images_per_group=10, packed=True)  # fmt: skip


def test_rows_of_llava_s_mixture_need_half_of_the_large_tiles_and_fewer_of_the_small():
    rows = mixture.rows(**LLAVA_ROWS)
    assert rows.tile_shares[512] <= 0.502 and rows.tile_shares[256] <= 0.383 and rows.tile_shares[128] <= 0.317
    assert rows.tokens / rows.samples == pytest.approx(858, abs=1) and rows.tokens > 0.985 * 4096
    assert rows.images / rows.samples == pytest.approx(0.94, abs=0.01)
    assert rows.pairs < min(rows.tile_shares.values()) * 4096 * 4097 / 2


def test_the_share_of_tiles_is_that_which_the_kernel_visits():
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 300, rng.integers(0, 7)) for _ in range(5)]
    starts = np.append(0, np.cumsum([len(row) for row in rows]))
    segments = np.zeros((len(rows), 2048), np.int32)
    for row, lengths in zip(segments, rows):
        row[: lengths.sum()] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    for tile in mixture.TILES[::2]:
        ids = jnp.asarray(segments)
        visits, side = flash.visits(ids, ids, tile), 2048 // tile
        share = mixture.tile_share(np.concatenate(rows), starts, 2048, tile)
        assert share == visits.counts.sum() / (len(rows) * side * (side + 1) / 2)


def test_rows_of_one_record_hold_it_alone_and_a_kernel_without_segments_visits_every_tile():
    rows = mixture.rows(**LLAVA_ROWS | {"packed": False, "mean": 700, "row_tokens": 2048, "longest": 2048})
    assert rows.samples == 1 and rows.tokens == pytest.approx(690, abs=15)  # what is longer than a row is cut
    assert set(rows.tile_shares.values()) == {1.0}


def test_a_caption_is_short_and_has_a_picture():
    rows = mixture.rows(**LLAVA_ROWS | {"captions": True, "images_per_group": 14})
    assert rows.images == rows.samples and rows.tokens / rows.samples == pytest.approx(576 + 29, abs=1)
