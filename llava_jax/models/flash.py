"""Flash attention of causal rows on TPU: two Pallas kernels that compute only the parts in which some query sees a key.

A visit reads a tile of queries and one of keys, large ones since a visit itself costs time, and computes those of its
parts that share a sample, as few as small tiles would be.

jax's and tokamax's splash attention (jax 0.10.2 to 0.12.0.1, tokamax 0.0.17) want queries that are scaled beforehand,
which rounds bfloat16 ones once more; these kernels scale float32 scores. jax's also computes tiles whose queries and
keys share no sample, tokamax's skips those by one schedule for all rows of a batch; here every row has its own.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llava_jax.models.remat import ATTENTION, named
from llava_jax.models.tiled import NEVER, key_ends, visible

LANES = 128
TILES = (512, 384, 256, 128)  # the largest that divides a row is taken
PART = 256  # the side of a tile's parts, where it is a multiple
# Keys of long rows go span by span through the backward kernel: their sums and results may take this much of the
# 16 MiB of vector memory that every TPU has.
SPAN_BYTES = 8 << 20

_NN, _NT, _TN = (((a, b), ((), ())) for a, b in (((1,), (0,)), ((1,), (1,)), ((0,), (0,))))


class Visits(NamedTuple):
    """The tiles that are visited of each row, in order: all that a tile of queries sees, then those of the next.

    parts: a bit for each part that is computed, those of the first queries lowest.
    counts: how many; what follows repeats the last one.
    """

    queries: Int[Array, "B Visits"]
    keys: Int[Array, "B Visits"]
    parts: Int[Array, "B Visits"]
    counts: Int[Array, "B"]


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention of rows with themselves, as `attention` defines it; T is a multiple of 128.

    interpret: run the kernels on a machine without a TPU, for tests.
    """
    of_keys = jnp.full(q.shape[:2], q.shape[1], jnp.int32) if segments is None else key_ends(segments)
    return _flash(interpret, *(x.swapaxes(1, 2) for x in (q, k, v)), of_keys).swapaxes(1, 2)


def tile_of(tokens: int) -> int:
    """The side of a row's tiles."""
    return next(size for size in TILES if tokens % size == 0)


def part_of(tile: int) -> int:
    """The side of a tile's parts."""
    return min(tile, PART) if tile % PART == 0 else tile


def visits(ends: Int[Array, "B S"], tokens: int, tile: int) -> Visits:
    """The tiles with a part in which one of `tokens` queries sees a key, by the `ends` of the keys; S <= tokens.

    Queries behind all keys visit the last tile of keys in any case.
    """
    rows, part = len(ends), part_of(tile)
    tiles, others, side = tokens // tile, ends.shape[1] // tile, tile // part
    queries, keys = (x.astype(np.int32) for x in np.tril_indices(tiles, m=others))
    shared = visible(ends, part, tiles * side)
    shared = shared.reshape(rows, tiles, side, others, side).swapaxes(2, 3)[:, queries, keys]
    parts = (shared.reshape(*shared.shape[:2], -1) << np.arange(side * side, dtype=np.int32)).sum(2, dtype=jnp.int32)
    visited = (parts > 0) | ((queries >= others) & (keys == others - 1))
    counts = visited.sum(axis=1, dtype=jnp.int32)
    order = jnp.argsort(~visited, axis=1, stable=True)
    order = jnp.take_along_axis(order, jnp.minimum(jnp.arange(queries.size), counts[:, None] - 1), axis=1)
    return Visits(jnp.asarray(queries)[order], jnp.asarray(keys)[order], jnp.take_along_axis(parts, order, 1), counts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(interpret: bool, q: Array, k: Array, v: Array, ends: Array) -> Array:
    """[B, N, T, H] of queries, and keys and values with heads before tokens too."""
    return _flash_forward(interpret, q, k, v, ends)[0]


def _flash_forward(interpret: bool, q: Array, k: Array, v: Array, ends: Array) -> tuple[Array, Any]:
    tile, width = tile_of(q.shape[2]), q.shape[3]
    queries, keys, of_queries, _ = _specs(q, k, tile)
    out, sums = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, (*q.shape[:2], 1, q.shape[2])))
    scratch = [((tile, LANES), jnp.float32), ((tile, LANES), jnp.float32), ((tile, width), jnp.float32)]
    out, sums = _call(
        _forward_kernel, "flash_forward", interpret, q, k, ends,
        inputs=[(q, queries), (k, keys), (v, keys)], results=[(out, queries), (sums, of_queries)], scratch=scratch,
    )  # fmt: skip
    out, sums = named(out, ATTENTION), named(sums, ATTENTION)
    return out.astype(v.dtype), (q, k, v, ends, out, sums)


def _flash_backward(interpret: bool, residuals: Any, slope: Array) -> tuple[Array, Array, Array, None]:
    """`out` is float32 here: rounded, it blurs the gradients of sharp weights."""
    q, k, v, ends, out, sums = residuals
    inner = (slope.astype(jnp.float32) * out).sum(axis=-1)[:, :, None]
    tokens, tile = q.shape[2], tile_of(q.shape[2])
    token_bytes = pl.cdiv(q.shape[3], LANES) * LANES * (2 * 4 + 2 * 2 * k.dtype.itemsize)  # results are buffered twice
    starts = range(0, tokens, max(1, SPAN_BYTES // token_bytes // tile) * tile)
    of_queries, of_keys, of_values = [], [], []
    for start in starts:
        own, seen = slice(start, None), slice(start, start + starts.step)
        dq, dk, dv = _span_backward(
            interpret, q[:, :, own], k[:, :, seen], v[:, :, seen], ends[:, seen] - start, slope[:, :, own],
            sums[..., own], inner[..., own], q.dtype if len(starts) == 1 else jnp.float32,
        )  # fmt: skip
        of_queries.append(jnp.pad(dq, ((0, 0), (0, 0), (start, 0), (0, 0))))
        of_keys.append(dk)
        of_values.append(dv)
    of_keys, of_values = (jnp.concatenate(parts, axis=2) for parts in (of_keys, of_values))
    return functools.reduce(jnp.add, of_queries).astype(q.dtype), of_keys, of_values, None


_flash.defvjp(_flash_forward, _flash_backward)


def _span_backward(
    interpret: bool, q: Array, k: Array, v: Array, ends: Array, slope: Array, sums: Array, inner: Array, dtype: Any
) -> Sequence[Array]:  # fmt: skip
    """Gradients by some keys and all queries from the first of them on; that of the queries has `dtype`."""
    tile, width = tile_of(q.shape[2]), q.shape[3]
    queries, keys, of_queries, span = _specs(q, k, tile)
    scratch = [((tile, width), jnp.float32), (k.shape[2:], jnp.float32), (k.shape[2:], jnp.float32)]
    return _call(
        _backward_kernel, "flash_backward", interpret, q, k, ends,
        inputs=[(q, queries), (k, keys), (v, keys), (slope, queries), (sums, of_queries), (inner, of_queries)],
        results=[(jax.ShapeDtypeStruct(q.shape, dtype), queries), (k, span), (v, span)], scratch=scratch,
    )  # fmt: skip


def _specs(q: Array, k: Array, tile: int) -> tuple[pl.BlockSpec, ...]:
    """What a visit reads or writes of arrays like q, like k, of numbers [B, N, 1, T], and of the whole of k's head."""
    group, width = q.shape[1] // k.shape[1], q.shape[3]
    return (
        pl.BlockSpec((None, None, tile, width), lambda b, k, g, s, queries, *_: (b, k * group + g, queries[b, s], 0)),
        pl.BlockSpec((None, None, tile, width), lambda b, k, g, s, queries, keys, *_: (b, k, keys[b, s], 0)),
        pl.BlockSpec((None, None, 1, tile), lambda b, k, g, s, queries, *_: (b, k * group + g, 0, queries[b, s])),
        pl.BlockSpec((None, None, *k.shape[2:]), lambda b, k, g, s, *_: (b, k, 0, 0)),
    )


def _call(
    kernel: Callable[..., None], name: str, interpret: bool, q: Array, k: Array, ends: Array, *,
    inputs: Sequence[tuple[Any, Any]], results: Sequence[tuple[Any, Any]], scratch: Sequence[tuple[Any, Any]],
) -> Sequence[Array]:  # fmt: skip
    """`kernel` on a grid of rows, key heads, query heads of each, and visits, of which rows may have fewer."""
    tile = tile_of(q.shape[2])
    schedule = visits(ends, q.shape[2], tile)
    of_keys = pl.BlockSpec((None, 1, tile), lambda b, k, g, s, queries, keys, *_: (b, 0, keys[b, s]))
    inputs = [*inputs, (ends[:, None], of_keys)]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(schedule),
        grid=(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], schedule.counts.max()),
        in_specs=[spec for _, spec in inputs], out_specs=[spec for _, spec in results],
        scratch_shapes=[pltpu.VMEM(*one) for one in scratch],
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(kernel, scale=q.shape[3] ** -0.5),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name=name,
        metadata={"xprof_metadata": json.dumps({"tile": part_of(tile)})},  # `plan` counts products by it
    )(*schedule, *(x for x, _ in inputs))


class _Visit:
    """Where a kernel's step stands: tile i of queries, tile j of keys."""

    def __init__(self, queries: Any, keys: Any, parts: Any, counts: Any) -> None:
        row, step = pl.program_id(0), pl.program_id(3)
        before, after = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, queries.shape[1] - 1)
        self.i, self.j, self.parts = queries[row, step], keys[row, step], parts[row, step]
        self.opens = (step == 0) | (queries[row, before] != self.i)
        self.works = step < counts[row]
        self.ends_row = step == counts[row] - 1
        self.closes = self.works & (self.ends_row | (queries[row, after] != self.i))

    def each_part(self, tile: int, compute: Callable[[slice, slice], None]) -> None:
        """Calls `compute` with the queries and keys of each part that is to be computed, the first keys first."""
        part = part_of(tile)
        places = [slice(start, start + part) for start in range(0, tile, part)]
        for number, (queries, keys) in enumerate(itertools.product(places, places)):
            pl.when(self.works & ((self.parts >> number) & 1 == 1))(functools.partial(compute, queries, keys))


def _dot(a: Array, b: Array, dims: Any) -> Array:
    # Mosaic refuses a precision of bfloat16 products, so jax's default of one may reach float32 ones only.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _seen(visit: _Visit, tile: int, queries: slice, keys: slice, ends: Array, axis: int) -> Array:
    """Where in a part a query sees a key; axis: along which the queries lie, where the `ends` of the keys are alike."""
    part, first = queries.stop - queries.start, visit.i * tile + queries.start
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (part, part), one) for one in (axis, 1 - axis))
    return (query + (first - visit.j * tile - keys.start) >= key) & (query < ends - first)


def _forward_kernel(*refs: Any, scale: float) -> None:
    """Online softmax: `top` and `total` hold a query's largest score and its sum of weights in all lanes alike."""
    *schedule, q, k, v, ends, out, sums, top, total, weighted = refs
    visit, (tile, width) = _Visit(*schedule), q.shape

    @pl.when(visit.opens)
    def _() -> None:
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def compute(queries: slice, keys: slice) -> None:
        lanes = (queries.stop - queries.start) // LANES
        seen = _seen(visit, tile, queries, keys, ends[:, keys], 0)
        scores = jnp.where(seen, _dot(q[queries], k[keys], _NT) * scale, NEVER)
        before, now = top[queries], jnp.maximum(top[queries], scores.max(axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - jnp.tile(now, (1, lanes))), jnp.exp(before - now)
        top[queries] = now
        total[queries] = shrink * total[queries] + weights.sum(axis=1, keepdims=True)
        part = _dot(weights.astype(v.dtype), v[keys], _NN)
        weighted[queries] = _wide(shrink, width) * weighted[queries] + part

    visit.each_part(tile, compute)

    @pl.when(visit.closes)
    def _() -> None:
        out[...] = (weighted[...] / _wide(total[...], width)).astype(out.dtype)
        sums[...] = (top[...] + jnp.log(total[...])).T[:1]


def _wide(same: Array, width: int) -> Array:
    """A value of all lanes alike, for rows of `width`."""
    return jnp.tile(same, (1, pl.cdiv(width, LANES)))[:, :width]


def _backward_kernel(*refs: Any, scale: float) -> None:
    """All three gradients from one tile's weights, which are transposed: [keys, queries]."""
    *schedule, q, k, v, slope, sums, inner, ends, dq, dk, dv, dq_sum, dk_sum, dv_sum = refs
    visit, tile, head = _Visit(*schedule), q.shape[0], pl.program_id(2)

    @pl.when((pl.program_id(3) == 0) & (head == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(visit.opens)
    def _() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)

    def compute(queries: slice, keys: slice) -> None:
        size = keys.stop - keys.start
        own = pl.ds(pl.multiple_of(visit.j * tile + keys.start, size), size)
        seen = _seen(visit, tile, queries, keys, ends[:, keys].T, 1)
        scores = jnp.where(seen, _dot(k[keys], q[queries], _NT) * scale, NEVER)
        weights = jnp.exp(scores - sums[:, queries])
        dv_sum[own] += _dot(weights.astype(slope.dtype), slope[queries], _NN)
        of_weights = _dot(v[keys], slope[queries], _NT)
        of_scores = (weights * (of_weights - inner[:, queries])).astype(q.dtype)
        dk_sum[own] += _dot(of_scores, q[queries], _NN)
        dq_sum[queries] += _dot(of_scores, k[keys], _TN)

    visit.each_part(tile, compute)

    @pl.when(visit.closes)
    def _() -> None:
        dq[...] = (dq_sum[...] * scale).astype(dq.dtype)

    @pl.when(visit.ends_row & (head == pl.num_programs(2) - 1))
    def _() -> None:
        dk[...] = (dk_sum[...] * scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
