"""Attention in plain XLA, a tile of scores at a time: what runs where no kernel does.

Scores never outlive their tile, and tiles in which no query sees a key are left out, at run time where samples decide.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llava_jax import sharding
from llava_jax.batch import TREES
from llava_jax.models.remat import ATTENTION, named

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without any key gives no NaN

SHORTEST_TILE, LONGEST_TILE = 128, 512

Numbers = Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_attention(
    causal: bool,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    numbers: Numbers | None = None,
) -> Float[Array, "B T N H"]:
    """Attention as `attention` defines it, of rows to themselves or to others.

    numbers: of causal rows the `key_ends`; of others the numbers of queries and of keys, where a query sees the
      keys of its own number. One that sees none gets some mean of v.
    """
    return _forward(causal, q, k, v, numbers)[0]


def key_ends(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The first query behind each key that no longer sees it: where its sample ends; of a prefix, where its tree ends.

    segments: as in a `Batch`; a sample's positions are neighbours.

        segments   1  1  1+b  1+b  1+2b  2  2  0        b: TREES
        ends       5  5    4    4     5  7  7  8
    """
    trees, tokens = segments % TREES, segments.shape[1]

    def run_ends(x: Array) -> Array:
        changes = jnp.where(x[:, 1:] != x[:, :-1], jnp.arange(1, tokens), tokens)
        changes = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=tokens)
        return jax.lax.cummin(changes, axis=1, reverse=True)

    return jnp.where(segments == trees, run_ends(trees), run_ends(segments))


def visible(ends: Int[Array, "B S"], tile: int, tiles: int) -> Bool[Array, "B Tiles Others"]:
    """Whether some query of a tile, of so many, sees some key of another: exactly, for any `ends`.

    The first query behind a tile of keys is the one that sees most of them.
    """
    last = ends.reshape(len(ends), -1, tile).max(axis=-1)
    return (jnp.arange(0, tiles * tile, tile)[:, None] < last[:, None]) & np.tri(tiles, last.shape[1], dtype=bool)


def schedule(seen: Bool[Array, "... Tiles Others"]) -> tuple[Int[Array, "... Tiles Others"], Int[Array, "... Tiles"]]:
    """For each tile the others, those that it is `seen` to meet first and in order; and how many these are."""
    return jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32), seen.sum(axis=-1, dtype=jnp.int32)


class _Tiles(NamedTuple):
    """How rows are cut: in `chunks` that go one after the other, and their queries and keys in so many tiles."""

    chunks: int
    queries: int
    keys: int

    def cut(self, x: Array, count: int) -> Array:
        """[B, ..., T, H] -> [chunks * count, B / chunks, ..., tile, H]; zeros fill the last tile."""
        tile = -(-x.shape[-2] // count)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, tile * count - x.shape[-2]), (0, 0)])
        x = jnp.moveaxis(x.reshape(self.chunks, -1, *x.shape[1:-2], count, tile, x.shape[-1]), -3, 1)
        return x.reshape(-1, *x.shape[2:])

    def join(self, x: Array, tokens: int) -> Array:
        """What `cut` made: [chunks * count, B / chunks, ..., tile, H] -> [B, ..., tokens, H]."""
        x = jnp.moveaxis(x.reshape(self.chunks, -1, *x.shape[1:]), 1, -3)
        return x.reshape(-1, *x.shape[2:-3], x.shape[-3] * x.shape[-2], x.shape[-1])[..., :tokens, :]


class _Keys(NamedTuple):
    """Keys, values, and numbers with a last dimension of 1, each as `cut` makes it; or one tile of them."""

    keys: Array
    values: Array
    numbers: Array | None

    def tile(self, place: Array) -> "_Keys":
        return jax.tree.map(lambda x: x[place], self)


class _Block(NamedTuple):
    """A tile of queries, the `place` of its row's first tile of keys, and the first `count` of `seen` after it."""

    place: Array
    own: Array
    seen: Array
    count: Array
    queries: Array
    numbers: Array | None


def _side(causal: bool, tokens: int) -> int:
    """The longest that a tile of queries may be.

    Causal rows leave tiles out, more of them where they are small; on an accelerator an eighth of the row is large
    enough. A CPU's caches want small ones: 4 packed rows of 4,096, 8 heads of 64, forward and backward, take 3.08 s of
    both cores with tiles of 512, 1.89 with 256 and 1.46 with 128 (EPYC, jax 0.10.2, 2026-11-30). Other rows leave none
    out: there tiles bound the memory only.
    """
    if not causal:
        return 2 * LONGEST_TILE
    if sharding.platform() == "cpu":
        return SHORTEST_TILE
    return min(LONGEST_TILE, max(SHORTEST_TILE, tokens // 8))


def _cut(causal: bool, q: Array, k: Array, v: Array, numbers: Numbers | None) -> tuple[_Tiles, _Block, _Keys]:
    """The tiles, and all blocks of queries in the order of `lax.scan`."""
    rows, tokens = q.shape[:2]
    count = -(-tokens // _side(causal, tokens))
    skips = causal and numbers is not None and count > 1
    tiles = _Tiles(rows if skips else 1, count, count if causal else 1)
    of_queries, of_keys = (None, numbers) if causal or numbers is None else numbers
    of_queries, of_keys = (None if x is None else tiles.cut(x[..., None], n)
                           for x, n in ((of_queries, tiles.queries), (of_keys, tiles.keys)))  # fmt: skip
    keys = _Keys(*(tiles.cut(x.swapaxes(1, 2), tiles.keys) for x in (k, v)), of_keys)
    chunk, place = (x.reshape(-1) for x in jnp.indices((tiles.chunks, tiles.queries)))
    seen = jnp.asarray(np.tri(count, tiles.keys, dtype=bool))[None]
    if skips:
        seen = visible(of_keys.reshape(rows, -1), of_keys.shape[2], count)
    seen = seen.reshape(len(place), -1)
    order, visits = schedule(seen)
    queries = tiles.cut(_grouped(q, k.shape[2]), tiles.queries)
    return tiles, _Block(chunk * tiles.keys, place, order, visits, queries, of_queries), keys


def _forward(causal: bool, q: Array, k: Array, v: Array, numbers: Numbers | None) -> tuple[Array, Any]:
    tiles, blocks, keys = _cut(causal, q, k, v, numbers)

    def block(_: None, own: _Block) -> tuple[None, tuple[Array, Array]]:
        def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            before, total, weighted = state
            seen = keys.tile(own.place + own.seen[j])
            scores = _scores(causal, own, seen, own.seen[j])
            top = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - top), jnp.exp(before - top)
            part = _sum("bkgts,bksh->bkgth", weights.astype(v.dtype), seen.values)
            return top, shrink * total + weights.sum(axis=-1, keepdims=True), shrink * weighted + part

        zero = jnp.zeros(own.queries.shape, jnp.float32)
        start = (zero[..., :1] + NEVER, zero[..., :1], zero)
        top, total, weighted = jax.lax.fori_loop(0, own.count, step, start)
        return None, (weighted / total, top + jnp.log(total))

    _, parts = jax.lax.scan(block, None, blocks)
    out, sums = (named(tiles.join(x, q.shape[1]), ATTENTION) for x in parts)
    return _ungrouped(out).astype(v.dtype), (q, k, v, numbers, out, sums)


def _backward(causal: bool, residuals: Any, slope: Array) -> tuple[Array, Array, Array, None]:
    """The weights are made again from the sums that are kept. `out` is float32: rounded, it blurs sharp weights' dq.

    Gradients of keys and values are summed transposed, [..., H, S]: what is transposed for their products is then a
    block's queries, once, and not the weights of every tile (0.87 x the time of both cores, EPYC, jax 0.10.2).
    """
    q, k, v, numbers, out, sums = residuals
    tiles, blocks, keys = _cut(causal, q, k, v, numbers)
    slope = _grouped(slope, k.shape[2])
    inner = (slope.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    of_out = [tiles.cut(x, tiles.queries) for x in (slope, inner, sums)]

    def block(of_keys: tuple[Array, Array], x: tuple[_Block, list[Array]]) -> tuple[tuple[Array, Array], Array]:
        own, (slope, inner, sums) = x
        queries_t, slope_t = _flat(own.queries).mT, _flat(slope).mT

        def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            at = own.place + own.seen[j]
            seen = keys.tile(at)
            weights = jnp.exp(_scores(causal, own, seen, own.seen[j]) - sums)
            of_weights = _sum("bkgth,bksh->bkgts", slope, seen.values)
            of_scores = (weights * (of_weights - inner) * q.shape[3] ** -0.5).astype(k.dtype)
            dq += _sum("bkgts,bksh->bkgth", of_scores, seen.keys)
            dk = dk.at[at].add(_sum("bkht,bkts->bkhs", queries_t, _flat(of_scores)))
            dv = dv.at[at].add(_sum("bkht,bkts->bkhs", slope_t, _flat(weights.astype(v.dtype))))
            return dq, dk, dv

        zero = jnp.zeros(own.queries.shape, jnp.float32)
        dq, *of_keys = jax.lax.fori_loop(0, own.count, step, (zero, *of_keys))
        return tuple(of_keys), dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.mT.shape, jnp.float32) for x in keys[:2])
    of_keys, dq = jax.lax.scan(block, zeros, (blocks, of_out))
    dk, dv = (tiles.join(x.mT, k.shape[1]).astype(k.dtype).swapaxes(1, 2) for x in of_keys)
    return _ungrouped(tiles.join(dq, q.shape[1])), dk, dv, None


tiled_attention.defvjp(_forward, _backward)


def _scores(causal: bool, own: _Block, seen: _Keys, j: Array) -> Array:
    """Float32 scores [B / chunks, K, G, tile of queries, tile j of keys], `NEVER` where a query may not look."""
    scores = _sum("bkgth,bksh->bkgts", own.queries, seen.keys) * own.queries.shape[-1] ** -0.5
    if causal:
        queries, keys = (i * size + jnp.arange(size) for i, size in zip((own.own, j), scores.shape[-2:]))
        scores = jnp.where(keys <= queries[:, None], scores, NEVER)
    if seen.numbers is not None:
        mask = queries[:, None] < seen.numbers.mT if causal else own.numbers == seen.numbers.mT
        scores = jnp.where(mask[:, None, None], scores, NEVER)
    return scores


def _sum(letters: str, *factors: Array) -> Array:
    return jnp.einsum(letters, *factors, preferred_element_type=jnp.float32)


def _flat(x: Array) -> Array:
    """[B, K, G, T, X] -> [B, K, G * T, X]"""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _grouped(x: Array, groups: int) -> Array:
    """[B, T, N, H] -> [B, K, N / K, T, H]"""
    return jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, x.shape[3]), 1, 3)


def _ungrouped(x: Array) -> Array:
    rows, groups, heads, tokens, width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(rows, tokens, groups * heads, width)
