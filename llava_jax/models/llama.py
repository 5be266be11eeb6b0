"""The LLaMA decoder: one scan over the stacked blocks in training, unrolled in prefill and decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import attention
from llava_jax.models.cache import LayerCache, from_prefill, write
from llava_jax.models.layers import Dense, Params, RMSNorm, remat, rotary, rotate, stacked, take_layer
from llava_jax.models.presets import LlamaConfig
from llava_jax.sharding import constrain

Rotation = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]


class LlamaBlock(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, RMSNorm, gated SiLU mlp."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        last_key: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Returns the block's output and the keys and values: the new ones, or the whole cache if one was given."""
        config = self.config
        y = RMSNorm(config.eps, self.dtype, name="ln1")(x)
        q = self._heads("q", config.heads, y)
        k = self._heads("k", config.kv_heads, y)
        v = self._heads("v", config.kv_heads, y)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        # With a cache the slot is the position, so `last_key` is both where to write and how far to look.
        kept = LayerCache(k, v) if cache is None else write(cache, k, v, last_key)
        pair = None if segments is None else (segments, segments)
        y = attention(q, kept.k, kept.v, last_key=last_key, segments=pair)
        x = x + Dense(config.width, dtype=self.dtype, name="o")(y.reshape(*x.shape[:2], -1))
        y = RMSNorm(config.eps, self.dtype, name="ln2")(x)
        gate = nn.silu(Dense(config.mlp_width, dtype=self.dtype, name="gate")(y))
        y = gate * Dense(config.mlp_width, dtype=self.dtype, name="up")(y)
        return x + Dense(config.width, dtype=self.dtype, name="down")(y), kept

    def _heads(self, name: str, heads: int, y: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        y = Dense(heads * self.config.head_width, dtype=self.dtype, name=name)(y)
        return y.reshape(*y.shape[:2], heads, self.config.head_width)


class Llama(nn.Module):
    """Embeddings in, normed hidden states out; `head` turns those into float32 logits where they are wanted."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(0.02)
        self.embeddings = self.param("embed", self._init_rows, normal, (0, config.width))
        self.block = LlamaBlock(config, self.dtype, parent=None)
        example = jnp.zeros((1, 1, config.width), self.dtype)
        place = jnp.zeros((1, 1), jnp.int32)
        self.blocks = stacked(self, "blocks", self.block, config.layers, example, rotary(place, config), place)
        self.norm = RMSNorm(config.eps, self.dtype)
        if not config.tie_embeddings:
            self.output = self.param("head", self._init_rows, normal, (1, config.width))

    def _init_rows(self, key: Array, init: Any, layout: tuple[int, int]) -> dict[str, Array]:
        """Vocabulary rows [V, D] (axis 0: the embedding) or columns [D, V] (axis 1: the head), added ones apart."""
        axis, width = layout
        first, second = jax.random.split(key)
        names = ("table", "added") if axis == 0 else ("kernel", "added")
        sizes = (self.config.vocab, self.config.added_tokens)
        shapes = [(size, width) if axis == 0 else (width, size) for size in sizes]
        return {
            name: init(k, shape) for name, k, shape, size in zip(names, (first, second), shapes, sizes) if size
        }

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding, in `dtype`."""
        rows = jnp.take(self.embeddings["table"], tokens, axis=0, mode="clip").astype(self.dtype)
        if self.config.added_tokens:
            extra = jnp.take(self.embeddings["added"], tokens - self.config.vocab, axis=0, mode="clip")
            rows = jnp.where((tokens >= self.config.vocab)[..., None], extra.astype(self.dtype), rows)
        return rows

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Full forward of rows that may hold several samples each."""
        rotation = rotary(positions, self.config)
        order = jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape)

        def body(x: Array, layer: Params) -> tuple[Array, None]:
            x, _ = self.block.apply({"params": layer}, x, rotation, order, segments)
            return constrain(x, "batch", "tokens"), None

        x, _ = jax.lax.scan(remat(self.remat)(body), x, self.blocks)
        return self.norm(x)

    def prefill(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache_tokens: int
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """Forward of prompts padded on the right (`positions` = 0 .. T-1), keeping keys and values."""
        rotation = rotary(positions, self.config)

        kept = []
        for index in range(self.config.layers):  # a scan wants stacks, which decoding would copy whole
            x, pair = self.block.apply({"params": take_layer(self.blocks, index)}, x, rotation, positions)
            kept.append(pair)
        return self.norm(x), from_prefill(kept, cache_tokens)

    def decode(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: tuple[LayerCache, ...]
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """Forward of new tokens at `positions` against the cache; usually T is 1."""
        rotation = rotary(positions, self.config)
        kept = []
        for index, layer_cache in enumerate(cache):  # a scan would hold a second copy of the whole cache
            layer = take_layer(self.blocks, index)
            x, layer_cache = self.block.apply({"params": layer}, x, rotation, positions, None, layer_cache)
            kept.append(layer_cache)
        return self.norm(x), tuple(kept)

    def head(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits over the vocabulary, added rows last."""
        kernels = [self.embeddings["table"].T] if self.config.tie_embeddings else [self.output["kernel"]]
        if self.config.added_tokens:
            kernels.append(self.embeddings["added"].T if self.config.tie_embeddings else self.output["added"])
        parts = [
            jnp.matmul(hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
            for kernel in kernels
        ]
        return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
