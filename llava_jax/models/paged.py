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

PAGE = 32  # positions: what is shared is whole pages, and a system text is some 35 tokens
TILE_PAGES = 4  # whose scores exist at once


class PagedCache(NamedTuple):
    """Rotated keys and values of one layer, and the pages of each row.

    The positions of a head stand together, as the products take them: otherwise XLA copies every tile once more, which
    on a CPU is a third of attention.

    table: page `table[r, p // PAGE]` holds position p of row r. Its width is a multiple of TILE_PAGES.
    """

    k: Float[Array, "Pages K Page H"]
    v: Float[Array, "Pages K Page H"]
    table: Int[Array, "R P"]

    def attend(
        self, q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"],
        positions: Int[Array, "R T"],
    ) -> tuple["PagedCache", Float[Array, "R T N H"]]:  # fmt: skip
        """The cache with new keys and values at `positions`, and the attention of their queries to all up to there."""
        pages = jnp.take_along_axis(self.table, positions // PAGE, axis=1)
        # Each head's vector by itself: TPU's compiler copies a pool whose pages are written across their heads.
        places = pages[..., None], jnp.arange(self.k.shape[1]), (positions % PAGE)[..., None]
        cache = PagedCache(
            *(constrain(pool.at[places].set(new.astype(pool.dtype)), None, "heads")
              for pool, new in ((self.k, k), (self.v, v))),
            self.table,
        )  # fmt: skip
        return cache, cache._attention(q, positions)

    def _attention(self, q: Float[Array, "R T N H"], positions: Int[Array, "R T"]) -> Float[Array, "R T N H"]:
        rows, tokens, heads, width = q.shape
        kv_heads, keys = self.k.shape[1], TILE_PAGES * PAGE
        queries = constrain(q.reshape(rows, tokens, kv_heads, heads // kv_heads, width), None, None, "heads")

        def tile(pool: Array, pages: Array) -> Float[Array, "R K S H"]:
            return constrain(jnp.moveaxis(pool[pages], 2, 1).reshape(rows, kv_heads, keys, width), None, "heads")

        def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            before, total, weighted = state
            pages = jax.lax.dynamic_slice_in_dim(self.table, j * TILE_PAGES, TILE_PAGES, axis=1)
            seen = j * keys + jnp.arange(keys) <= positions[..., None]  # [R, T, S]
            scores = jnp.einsum("rtkgh,rksh->rkgts", queries, tile(self.k, pages), preferred_element_type=jnp.float32)
            scores = jnp.where(seen[:, None, None], scores * width**-0.5, NEVER)
            top = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - top), jnp.exp(before - top)
            # What another request left in a page beyond this row's end must not count, were it not finite.
            values = jnp.where(seen.any(axis=1)[:, None, :, None], tile(self.v, pages), 0)
            part = jnp.einsum("rkgts,rksh->rkgth", weights.astype(values.dtype), values,
                              preferred_element_type=jnp.float32)  # fmt: skip
            return top, shrink * total + weights.sum(axis=-1, keepdims=True), shrink * weighted + part

        zero = jnp.zeros((rows, kv_heads, heads // kv_heads, tokens, width), jnp.float32)
        start = (zero[..., :1] + NEVER, zero[..., :1], zero)
        tiles = positions.max() // keys + 1
        _, total, weighted = jax.lax.fori_loop(0, tiles, step, start)
        return jnp.moveaxis(weighted / total, 3, 1).reshape(q.shape).astype(self.v.dtype)
