"""What `plan` assumes of rows is what the planner packs and the kernels visit."""

import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax import params, sharding
from llava_jax.batch import TREES
from llava_jax.models import flash, presets, tiled
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.plan import mixture, report
from llava_jax.train import flops, loss
from llava_jax.train import program as programs

TINY = Path(__file__).parents[2] / "configs" / "tiny_pretrain.py"

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
    rows = [rng.integers(20, 300, rng.integers(0, 7)) for _ in range(5)]
    starts, lengths = np.append(0, np.cumsum([len(row) for row in rows])), np.concatenate(rows)
    again = rng.random(len(lengths)) < 0.6
    again[starts[starts < len(lengths)]] = False
    prefixes = 19 * np.ones_like(lengths)
    segments = np.zeros((len(rows), 2048), np.int32)
    for row, first, last in zip(segments, starts, starts[1:]):
        pieces, number = [], 0
        for length, shared in zip(lengths[first:last], again[first:last]):
            number = number + TREES if shared else number % TREES + 1 + TREES
            pieces += [[number % TREES] * 19 * (not shared), [number] * (length - 19)]
        pieces = sum(pieces, [])
        row[: len(pieces)] = pieces
    ends = mixture.key_ends(lengths, prefixes, again, starts, 2048)
    assert np.array_equal(ends, tiled.key_ends(jnp.asarray(segments)))
    for tile in mixture.TILES[::2]:
        visits, side = flash.visits(jnp.asarray(ends, jnp.int32), 2048, tile), 2048 // tile
        assert mixture.tile_share(ends, tile) == visits.counts.sum() / (len(rows) * side * (side + 1) / 2)


def test_trees_take_a_quarter_of_the_work_off_an_epoch_and_leave_rows_full():
    """Model FLOPs of LLaVA-1.5 7B a sample; its tower is frozen. 118,287 pictures for 364,100 of 665,298 records."""
    parts = [part for part in mixture.LLAVA if part.coco]
    assert (sum(part.records for part in parts), sum(part.records for part in mixture.LLAVA)) == (364_100, 665_298)
    apart, trees = (mixture.rows(**LLAVA_ROWS | {"images_per_group": images, "share_images": share})
                    for images, share in ((10, False), (9, True)))  # fmt: skip
    assert trees.all_tokens / trees.samples == pytest.approx(apart.tokens / apart.samples)
    assert trees.tokens > 0.985 * 4096 and 2 * trees.images > 0.8 * 9 and trees.tile_shares[256] < 0.43
    model = presets.get("llava15_7b")
    shapes = abstract_params(model)
    each = flops.count(flops.trace(Llava(model), shapes),
                       [name for name in params.flatten(shapes) if not name.startswith("vision/")])  # fmt: skip

    def work(row):
        supervised = (row.all_tokens - 576 * row.all_images) / 2
        return sum(map(operator.mul, each, (row.tokens, row.pairs, supervised, row.images))) / row.samples

    assert work(trees) <= 0.74 * work(apart)


def test_rows_of_one_record_hold_it_alone_and_a_kernel_without_segments_visits_every_tile():
    rows = mixture.rows(**LLAVA_ROWS | {"packed": False, "mean": 700, "row_tokens": 2048, "longest": 2048})
    assert rows.samples == 1 and rows.tokens == pytest.approx(690, abs=15)  # what is longer than a row is cut
    assert set(rows.tile_shares.values()) == {1.0}


def test_a_caption_is_short_and_has_a_picture():
    rows = mixture.rows(**LLAVA_ROWS | {"captions": True, "images_per_group": 14})
    assert rows.images == rows.samples and rows.tokens / rows.samples == pytest.approx(576 + 29, abs=1)


def test_a_micro_batch_s_loss_takes_its_own_positions_alone():
    """The loop over chunks is inside the loop over micro-batches: both counted whole would be counted twice."""
    chunks = []
    for accumulate in (1, 4):
        config = configs.load(TINY, {"model.preset": "tiny", "data.batch_samples": 256, "train.accumulate": accumulate})
        model = presets.get("tiny")
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
        work = report.workload_of(config, model, programs.build(config, model, 10, mesh))
        chunks.append((work.chunks, work.supervised / (accumulate * loss.CHUNK)))
    assert all(exact <= count < exact + 1 for count, exact in chunks) and chunks[0][0] > 2 * chunks[1][0] > 2
