"""Flash attention of causal rows on NVIDIA GPUs: Pallas kernels of the Triton backend, a program for each tile.

A program visits the tiles of the other side in which some query sees a key, by its row's own schedule. Both kernels of
the backward pass make the weights again, so that none adds to what another wrote, and every run has the same result.

jax 0.12 deprecates this backend for Mosaic GPU's, whose attention kernels (tokamax 0.0.17) are one for each generation
of GPUs; these compile for all of compute capability 8.0 to 12.0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Int

from llava_jax.models.remat import ATTENTION, named
from llava_jax.models.tiled import NEVER, key_ends, schedule, visible


class Launch(NamedTuple):
    """A kernel's tiles, the warps of a program, and the stages of its loads."""

    name: str
    queries: int
    keys: int
    warps: int
    stages: int


# XLA's compiler (jax 0.10.2 and 0.12.0.1, heads of 128, 2026-11-30) gives a program up to 80.5 KiB of shared memory on
# compute capability 8.x and 12.0, which have 99 or more, 96.5 on 9.0 and 128.6 on 10.0, which have 227. It spills none
# of the registers but 24 to 64 bytes in OF_KEYS; twice the keys spill more. No GPU has timed them.
FORWARD = Launch("flash_forward", 128, 64, 8, 2)
OF_QUERIES = Launch("flash_backward_queries", 64, 64, 4, 2)
OF_KEYS = Launch("flash_backward_keys", 64, 64, 4, 2)
NARROWEST = 16  # that Triton makes products of; a tile's sides are powers of 2


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention of rows with themselves, as `attention` defines it; T is a multiple of 128, H at most 128.

    interpret: run the kernels on a machine without a GPU, for tests.
    """
    width = q.shape[3]
    ends = jnp.full(q.shape[:2], q.shape[1], jnp.int32) if segments is None else key_ends(segments)
    added = max(NARROWEST, pl.next_power_of_2(width)) - width
    q, k, v = (jnp.pad(x, [(0, 0)] * 3 + [(0, added)]) for x in (q, k, v))
    return _flash(interpret, width**-0.5, q, k, v, ends)[..., :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(interpret: bool, scale: float, q: Array, k: Array, v: Array, ends: Array) -> Array:
    return _flash_forward(interpret, scale, q, k, v, ends)[0]


def _flash_forward(interpret: bool, scale: float, q: Array, k: Array, v: Array, ends: Array) -> tuple[Array, Any]:
    out, sums = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, (len(q), q.shape[2], q.shape[1])))
    call = functools.partial(_call, interpret, scale, seen_tiles(ends, FORWARD))
    out, sums = call(_forward_kernel, FORWARD, own=(q,), others=(k, v, ends), results=(out, sums))
    out, sums = named(out, ATTENTION), named(sums, ATTENTION)
    return out.astype(v.dtype), (q, k, v, ends, out, sums)


def _flash_backward(interpret: bool, scale: float, residuals: Any, slope: Array) -> tuple[Array, Array, Array, None]:
    """`out` is float32 here: rounded, it blurs the gradients of sharp weights."""
    q, k, v, ends, out, sums = residuals
    inner = (slope.astype(jnp.float32) * out).sum(axis=-1).swapaxes(1, 2)
    of_queries, of_keys = (q, slope, sums, inner), (k, v, ends)
    call = functools.partial(_call, interpret, scale, seen_tiles(ends, OF_QUERIES))
    (dq,) = call(_queries_kernel, OF_QUERIES, own=of_queries, others=of_keys, results=(q,))
    call = functools.partial(_call, interpret, scale, seen_tiles(ends, OF_KEYS).mT, group=q.shape[2] // k.shape[2])
    dk, dv = call(_keys_kernel, OF_KEYS, own=of_keys, others=of_queries, results=(k, v))
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


def seen_tiles(ends: Int[Array, "B T"], launch: Launch) -> Bool[Array, "B Queries Keys"]:
    """Whether some query of a kernel's tile sees some key of a tile."""
    (rows, tokens), side = ends.shape, min(launch.queries, launch.keys)
    cuts = [n for size in (launch.queries, launch.keys) for n in (tokens // size, size // side)]
    return visible(ends, side, tokens // side).reshape(rows, *cuts).any((2, 4))


def _call(
    interpret: bool, scale: float, seen: Array, kernel: Callable[..., None], launch: Launch, *,
    own: Sequence[Array], others: Sequence[Array], results: Sequence[Any], group: int | None = None,
) -> Sequence[Array]:  # fmt: skip
    """`kernel` for each tile, head and row of `own` and of the results, and all of that row of `others`.

    seen: which tiles of the others each tile visits.
    group: how many heads of the others belong to one of `own`; None: one, which several of `own` may share.
    """
    (tokens, heads), (rows, tiles, width) = own[0].shape[1:3], seen.shape
    share = 1 if group else heads // others[0].shape[2]

    def block(x: Any, size: int, group: int | None, share: int) -> pl.BlockSpec:
        """Of [B, T, N, H], [B, N, T] or [B, T]."""
        shape, place = {
            4: ((None, size, group, x.shape[-1]), lambda i, n, b: (b, i, n, 0)),
            3: ((None, group, size), lambda i, n, b: (b, n, i)),
            2: ((None, size), lambda i, n, b: (b, i)),
        }[x.ndim]
        return pl.BlockSpec(shape, lambda i, n, b: place(0 if size == tokens else i, n // share, b))

    tile = tokens // tiles
    return pl.pallas_call(
        functools.partial(kernel, launch=launch, scale=scale),
        grid=(tiles, heads, rows),
        in_specs=[
            pl.BlockSpec((None, None, width), lambda i, n, b: (b, i, 0)),
            pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
            *(block(x, tile, None, 1) for x in own), *(block(x, tokens, group, share) for x in others),
        ],
        out_specs=[block(x, tile, None, 1) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltriton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        name=launch.name,
    )(*schedule(seen), *own, *others)  # fmt: skip


def _places(tile: Any, size: int) -> tuple[Any, Array]:
    """A tile's slice of its row, and its positions there."""
    return pl.ds(tile * size, size), tile * size + jnp.arange(size)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _scores(a: Array, b: Array, queries: Array, keys: Array, ends: Array, scale: float) -> Array:
    """In units of log 2: what a GPU computes is 2^x. `NEVER` where a query does not see a key."""
    return jnp.where((keys <= queries) & (queries < ends), _dot(a, b.T) * (scale / math.log(2)), NEVER)


def _forward_kernel(*refs: Any, launch: Launch, scale: float) -> None:
    order, count, q, k, v, ends, out, sums = refs
    own, queries = q[...], _places(pl.program_id(0), launch.queries)[1][:, None]

    def visit(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, total, weighted = state
        tile, keys = _places(order[step], launch.keys)
        scores = _scores(own, k[tile], queries, keys, ends[tile], scale)
        top = jnp.maximum(before, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - top[:, None]), jnp.exp2(before - top)
        part = _dot(weights.astype(v.dtype), v[tile])
        return top, shrink * total + weights.sum(axis=1), shrink[:, None] * weighted + part

    start = *(jnp.full(own.shape[:1], x, jnp.float32) for x in (NEVER, 0)), jnp.zeros(own.shape, jnp.float32)
    top, total, weighted = jax.lax.fori_loop(0, count[...], visit, start)
    out[...] = weighted / total[:, None]
    sums[...] = top + jnp.log2(total)


def _queries_kernel(*refs: Any, launch: Launch, scale: float) -> None:
    order, count, q, slope, sums, inner, k, v, ends, dq = refs
    own, slope, sums, inner = q[...], slope[...], sums[...][:, None], inner[...][:, None]
    queries = _places(pl.program_id(0), launch.queries)[1][:, None]

    def visit(step: Array, total: Array) -> Array:
        tile, keys = _places(order[step], launch.keys)
        weights = jnp.exp2(_scores(own, k[tile], queries, keys, ends[tile], scale) - sums)
        of_scores = weights * (_dot(slope, v[tile].T) - inner)
        return total + _dot(of_scores.astype(own.dtype), k[tile])

    total = jax.lax.fori_loop(0, count[...], visit, jnp.zeros(own.shape, jnp.float32))
    dq[...] = (total * scale).astype(dq.dtype)


def _keys_kernel(*refs: Any, launch: Launch, scale: float) -> None:
    """Weights are transposed here: [keys, queries]. The query heads of a key head go one after the other."""
    order, count, k, v, ends, q, slope, sums, inner, dk, dv = refs
    own, values, ends = k[...], v[...], ends[...][:, None]
    keys = _places(pl.program_id(0), launch.keys)[1][:, None]

    def visit(head: Array, step: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        tile, queries = _places(order[step], launch.queries)
        seeing, slopes = q[tile, head], slope[tile, head]
        weights = jnp.exp2(_scores(own, seeing, queries, keys, ends, scale) - sums[head, tile])
        of_scores = weights * (_dot(values, slopes.T) - inner[head, tile])
        parts = _dot(of_scores.astype(own.dtype), seeing), _dot(weights.astype(own.dtype), slopes)
        return totals[0] + parts[0], totals[1] + parts[1]

    def each(head: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.fori_loop(0, count[...], functools.partial(visit, head), totals)

    zeros = jnp.zeros(own.shape, jnp.float32)
    of_keys, of_values = jax.lax.fori_loop(0, q.shape[1], each, (zeros, zeros))
    dk[...] = (of_keys * scale).astype(dk.dtype)
    dv[...] = of_values.astype(dv.dtype)
