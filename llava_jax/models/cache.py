"""The key/value cache of decoding: an argument and a result, one entry for each layer.

Slot s of a row holds position s, so prompts are padded on the right: what padding left in a slot is written over
when decoding reaches that position, and no query looks beyond its own position.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.errors import UsageError
from llava_jax.models.attention import cached_attention


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, those of a head together: products that read them want no copy of them."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    def attend(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple["LayerCache", Float[Array, "B T N H"]]:  # fmt: skip
        """The cache with new keys and values at `positions`, and the attention of their queries to all up to there."""
        held = write(self, k, v, positions)
        return held, cached_attention(q, held.k, held.v, positions)


def write(
    cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with new keys and values in the slots `positions`."""
    # Each head's vector by itself: TPU's compiler copies a cache that is written across its heads.
    places = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[2]), positions[..., None]
    return LayerCache(*(held.at[places].set(new.astype(held.dtype)) for held, new in ((cache.k, k), (cache.v, v))))


def of_prompt(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerCache:
    """The keys and values of a prompt as a cache."""
    return LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))


def from_prefill(prompt: Sequence[LayerCache], cache_tokens: int) -> tuple[LayerCache, ...]:
    """The cache after a prompt of T tokens, padded to `cache_tokens` >= T.

    Raises:
      ValueError: the prompt is longer than the cache.
    """
    missing = cache_tokens - prompt[0].k.shape[2]
    if missing < 0:
        raise UsageError(f"cache_tokens={cache_tokens} is shorter than the prompt of {prompt[0].k.shape[2]} tokens")
    pad = [(0, 0), (0, 0), (0, missing), (0, 0)]
    return tuple(LayerCache(jnp.pad(layer.k, pad), jnp.pad(layer.v, pad)) for layer in prompt)
