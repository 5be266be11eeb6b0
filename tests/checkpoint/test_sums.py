"""Fingerprints: the host's are the devices', parts add up to the whole, and damage changes them."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llava_jax.checkpoint import sums


def _bits(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype).reshape(shape)


SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 40_000), (70_000,), (2, 1, 3, 2), (5, 33_000), (0,), (0, 4), (4, 0), (2, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_host_finds_the_sums_of_the_devices(shape):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.int8, np.bool_):
        array = _bits(shape, dtype)
        written = sums.of_arrays({"x": jnp.asarray(array)})["x"]
        assert [*sums.of_part(array, [0] * array.ndim, shape), np.dtype(dtype).name] == written


def test_parts_of_any_shape_add_up_to_the_whole():
    shape = (4, 6, 40_000)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.int64):
        array = _bits(shape, dtype)
        cuts = [(0, 1, 4), (0, 2, 3, 6), (0, 100, 33_000, 40_000)]
        boxes = itertools.product(*(list(itertools.pairwise(cut)) for cut in cuts))
        parts = [
            sums.of_part(array[tuple(slice(*axis) for axis in box)], [axis[0] for axis in box], shape) for box in boxes
        ]
        assert sums.total(parts) == sums.of_part(array, (0, 0, 0), shape)


def test_flips_swaps_and_zeroed_blocks_change_the_sums():
    values = np.arange(1, 65, dtype=np.float32).reshape(4, 16)
    changed = [values.copy() for _ in range(4)]
    changed[1].view(np.uint32)[2, 3] ^= 1 << 17
    changed[2][0, [0, 1]] = changed[2][0, [1, 0]]
    changed[3][1] = 0
    assert len({sums.of_part(x, (0, 0), x.shape) for x in changed}) == 4


def test_every_single_flipped_bit_changes_them():
    values = _bits((3, 4), ml_dtypes.bfloat16)
    whole = sums.of_part(values, (0, 0), values.shape)
    for place in range(values.size * 16):
        other = values.copy()
        other.view(np.uint16).reshape(-1)[place // 16] ^= np.uint16(1 << place % 16)
        assert sums.of_part(other, (0, 0), values.shape) != whole


def test_a_mesh_changes_nothing():
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    array = _bits((len(jax.devices()) * 2, 6), np.float32)
    cut = jax.device_put(array, jax.NamedSharding(mesh, jax.P("x")))
    assert sums.of_arrays({"a": cut})["a"][:2] == [*sums.of_part(array, (0, 0), array.shape)]
