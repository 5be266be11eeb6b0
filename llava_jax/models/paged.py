"""The key/value cache of continuous batching: pages of a pool that rows of different lengths share.

Keys are read tile by tile with a running softmax. A tile that a row does not see changes none of its bits, so one
compiled program serves rows of any length beside each other, and a page may be shared by all rows that begin alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.models.tiled import NEVER
from llava_jax.sharding import constrain

PAGE = 8  # positions: what is shared is whole pages; 32 made the second turn of a short talk read half as much again
TILE_PAGES = 16  # whose scores exist at once


class PagedCache(NamedTuple):
    """Rotated keys and values of one layer, and the pages of each row.

    table: page `table[r, p // PAGE]` holds position p of row r. Its width is a multiple of TILE_PAGES.
    """

    k: Float[Array, "Pages Page K H"]
    v: Float[Array, "Pages Page K H"]
    table: Int[Array, "R P"]

    def attend(
        self, q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"],
        positions: Int[Array, "R T"],
    ) -> tuple["PagedCache", Float[Array, "R T N H"]]:  # fmt: skip
        """The cache with new keys and values at `positions`, and the attention of their queries to all up to there."""
        pages = jnp.take_along_axis(self.table, positions // PAGE, axis=1)
        cache = PagedCache(
            *(constrain(pool.at[pages, positions % PAGE].set(new.astype(pool.dtype)), None, None, "heads")
              for pool, new in ((self.k, k), (self.v, v))),
            self.table,
        )  # fmt: skip
        return cache, cache._attention(q, positions)

    def _attention(self, q: Float[Array, "R T N H"], positions: Int[Array, "R T"]) -> Float[Array, "R T N H"]:
        rows, tokens, heads, width = q.shape
        kv_heads, keys = self.k.shape[2], TILE_PAGES * PAGE
        queries = constrain(q.reshape(rows, tokens, kv_heads, heads // kv_heads, width), None, None, "heads")

        def tile(pool: Array, pages: Array) -> Float[Array, "R S K H"]:
            return constrain(pool[pages].reshape(rows, keys, kv_heads, width), None, None, "heads")

        def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            before, total, weighted = state
            pages = jax.lax.dynamic_slice_in_dim(self.table, j * TILE_PAGES, TILE_PAGES, axis=1)
            seen = j * keys + jnp.arange(keys) <= positions[..., None]  # [R, T, S]
            scores = jnp.einsum("rtkgh,rskh->rkgts", queries, tile(self.k, pages), preferred_element_type=jnp.float32)
            scores = jnp.where(seen[:, None, None], scores * width**-0.5, NEVER)
            top = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - top), jnp.exp(before - top)
            # What another request left in a page beyond this row's end must not count, were it not finite.
            values = jnp.where(seen.any(axis=1)[..., None, None], tile(self.v, pages), 0)
            part = jnp.einsum("rkgts,rskh->rkgth", weights.astype(values.dtype), values,
                              preferred_element_type=jnp.float32)  # fmt: skip
            return top, shrink * total + weights.sum(axis=-1, keepdims=True), shrink * weighted + part

        zero = jnp.zeros((rows, kv_heads, heads // kv_heads, tokens, width), jnp.float32)
        start = (zero[..., :1] + NEVER, zero[..., :1], zero)
        tiles = positions.max() // keys + 1
        _, total, weighted = jax.lax.fori_loop(0, tiles, step, start)
        return jnp.moveaxis(weighted / total, 3, 1).reshape(q.shape).astype(self.v.dtype)
