"""Fingerprints of arrays: two sums of their bits, the same whoever adds them up and into however many parts it is cut.

Devices make them while a run saves, readers make them anew on the host, of a whole array or of the parts that each
process reads. One flipped bit, two swapped values or a zeroed block change them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

Sums = tuple[int, int]

_FACTOR, _OFFSET, _SHIFT = 0x9E3779B1, 0x85EBCA6B, 15
_BLOCK = 2**15  # elements; what numpy works on at a time stays in a core's cache
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """{name: [sum, sum, dtype]}, to be written down beside the arrays. On the devices: it reads their memory once."""
    sums = jax.device_get(_on_devices(dict(arrays)))
    return {name: [*map(int, value), str(arrays[name].dtype)] for name, value in sums.items()}


def of_part(part: np.ndarray, begin: Sequence[int], shape: Sequence[int]) -> Sums:
    """The sums of a part of an array, on the host; those of disjoint parts add up (`total`) to the array's.

    Args:
      begin: where the part begins, in each dimension.
      shape: of the whole array.
    """
    if part.dtype.itemsize == 8:  # no device has these: they count as pairs
        part = np.ascontiguousarray(part).reshape(*part.shape, 1).view(np.uint32)
        begin, shape = (*begin, 0), (*shape, 2)
    bits = np.ascontiguousarray(part).view(_UNSIGNED[part.dtype.itemsize])
    if not bits.size:
        return 0, 0
    if not bits.ndim:
        bits, begin, shape = bits.reshape(1), (0,), (1,)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(bits.ndim)]
    # Blocks: some rows of `cut`, everything after it, one index of everything before it.
    cut = next(axis for axis in range(bits.ndim) if math.prod(bits.shape[axis + 1 :]) <= _BLOCK)
    row = math.prod(bits.shape[cut + 1 :])
    rows = max(1, _BLOCK // row)
    places = np.zeros((), np.uint32)
    for axis in range(cut, bits.ndim):
        size = min(rows, bits.shape[axis]) if axis == cut else bits.shape[axis]
        steps = np.arange(size, dtype=np.uint64) * np.uint64(strides[axis])
        places = places[..., None] + steps.astype(np.uint32)
    weights = (places * np.uint32(_FACTOR)).reshape(-1)
    first = second = 0
    for before in np.ndindex(bits.shape[:cut]):
        here = sum((b + i) * stride for b, i, stride in zip(begin, (*before, *[0] * bits.ndim), strides))
        values = bits[before].reshape(-1)
        for start in range(0, len(values), rows * row):
            offset = np.uint32(((here + start // row * strides[cut]) * _FACTOR + _OFFSET) % 2**32)
            one, two = _of_block(values[start : start + rows * row], weights, offset)
            first, second = first + one, second + two
    return first % 2**32, second % 2**32


def total(sums: Iterable[Sums]) -> Sums:
    """The sums of an array, of those of its parts."""
    first, second = 0, 0
    for one, two in sums:
        first, second = first + one, second + two
    return first % 2**32, second % 2**32


def _of_block(values: np.ndarray, weights: np.ndarray, offset: np.uint32) -> Sums:
    weight = weights[: len(values)] + offset
    weight ^= weight >> np.uint32(_SHIFT)
    weight |= np.uint32(1)
    # The upper half of 16 bits or 8 is zero.
    mixed = values ^ (values >> np.uint32(16)) if values.dtype == np.uint32 else values
    np.multiply(mixed, weight, out=weight)
    return int(weight.sum(dtype=np.uint32)), int(values.sum(dtype=np.uint32))


@jax.jit
def _on_devices(arrays: Any) -> Any:
    return jax.tree.map(_of_array, arrays)


def _of_array(x: Array) -> UInt32[Array, "2"]:
    """Sums modulo 2**32 of the bits, once weighted by position: addition has no order, so no mesh changes them."""
    x = jax.device_put(x, jax.memory.Space.Device)  # an offloaded optimizer's arrays are on the host
    unsigned = jnp.dtype(_UNSIGNED[x.dtype.itemsize])
    bits = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    weight = place * jnp.uint32(_FACTOR) + jnp.uint32(_OFFSET)
    weight = weight ^ (weight >> _SHIFT) | 1
    return jnp.stack([jnp.sum((bits ^ (bits >> 16)) * weight, dtype=jnp.uint32), jnp.sum(bits, dtype=jnp.uint32)])
