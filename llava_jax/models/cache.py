"""The key/value cache of decoding: an argument and a result, one entry for each layer.

Slot s of a row holds position s, so prompts are padded on the right: what padding left in a slot is written over
when decoding reaches that position, and no query looks beyond its own position.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.errors import UsageError
from llava_jax.models.attention import attention


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    def attend(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple["LayerCache", Float[Array, "B T N H"]]:  # fmt: skip
        """The cache with new keys and values at `positions`, and the attention of their queries to all up to there."""
        held = write(self, k, v, positions)
        return held, attention(q, held.k, held.v, last_key=positions)


def write(
    cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with new keys and values in the slots `positions`."""
    rows = jnp.arange(k.shape[0])[:, None]
    return LayerCache(
        cache.k.at[rows, positions].set(k.astype(cache.k.dtype)),
        cache.v.at[rows, positions].set(v.astype(cache.v.dtype)),
    )


def from_prefill(prompt: Sequence[LayerCache], cache_tokens: int) -> tuple[LayerCache, ...]:
    """The cache after a prompt of T tokens, padded to `cache_tokens` >= T.

    Raises:
      ValueError: the prompt is longer than the cache.
    """
    missing = cache_tokens - prompt[0].k.shape[1]
    if missing < 0:
        raise UsageError(f"cache_tokens={cache_tokens} is shorter than the prompt of {prompt[0].k.shape[1]} tokens")
    pad = [(0, 0), (0, missing), (0, 0), (0, 0)]
    return tuple(LayerCache(jnp.pad(layer.k, pad), jnp.pad(layer.v, pad)) for layer in prompt)
