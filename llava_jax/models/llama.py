"""The LLaMA decoder: one scan over the stacked blocks in training, unrolled in prefill and decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import attention
from llava_jax.models.cache import LayerCache, from_prefill, write
from llava_jax.models.layers import Dense, Params, RMSNorm, rotary, rotate, stacked, take_layer
from llava_jax.models.presets import LlamaConfig
from llava_jax.models.remat import ATTENTION, INPUT, QKV, named, remat
from llava_jax.sharding import constrain, constrain_parameters

Rotation = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]


class LlamaBlock(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, RMSNorm, gated SiLU mlp."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        segments: Int[Array, "B T"] | None = None,
        slots: Int[Array, "B T"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Returns the block's output and the keys and values: the new ones, or the whole cache if one was given.

        slots: where in `cache` each token is written; it sees this slot and those before.
        """
        config = self.config
        y = RMSNorm(config.eps, self.dtype, name="ln1")(x)
        q = self._heads("q", config.heads, y)
        k = self._heads("k", config.kv_heads, y)
        v = self._heads("v", config.kv_heads, y)
        q, k, v = (named(y, QKV) for y in (rotate(q, *rotation), rotate(k, *rotation), v))
        if cache is None:
            kept, y = LayerCache(k, v), attention(q, k, v, causal=True, segments=segments)
        else:
            kept = write(cache, k, v, slots)
            y = attention(q, kept.k, kept.v, last_key=slots)
        x = x + self._dense("o", config.width)(named(y, ATTENTION).reshape(*x.shape[:2], -1))
        y = RMSNorm(config.eps, self.dtype, name="ln2")(x)
        y = nn.silu(self._dense("gate", config.mlp_width)(y)) * self._dense("up", config.mlp_width)(y)
        return x + self._dense("down", config.width)(y), kept

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, dtype=self.dtype, dropout=self.lora_dropout, name=name)

    def _heads(self, name: str, heads: int, y: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        y = self._dense(name, heads * self.config.head_width)(y)
        return y.reshape(*y.shape[:2], heads, self.config.head_width)


class Llama(nn.Module):
    """Embeddings in, normed hidden states out; `head` turns those into float32 logits where they are wanted."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(0.02)
        self.embeddings = self.param("embed", self._init_rows, normal, (0, config.width))
        self.block = LlamaBlock(config, self.dtype, self.lora_dropout, parent=None)
        example = jnp.zeros((1, 1, config.width), self.dtype)
        place = jnp.zeros((1, 1), jnp.int32)
        self.blocks = stacked(self, "blocks", self.block, config.layers, example, rotary(place, config))
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
        """Rows of the embedding, in `dtype`.

        On a mesh every device reads its own part of the width for all tokens of its copy of the model, which are few
        bytes, and the parts are exchanged. Left alone XLA collects the whole table on every device.
        """
        tokens = constrain(tokens, "copies")
        rows = jnp.take(self.embeddings["table"], tokens, axis=0, mode="clip").astype(self.dtype)
        rows = constrain(rows, "copies", None, "width")
        if self.config.added_tokens:
            extra = jnp.take(self.embeddings["added"], tokens - self.config.vocab, axis=0, mode="clip")
            rows = jnp.where((tokens >= self.config.vocab)[..., None], extra.astype(self.dtype), rows)
        return constrain(rows, "batch", "tokens")

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Full forward of rows: of several samples each, which `segments` tell apart, or (None) of a single one."""
        rotation = rotary(positions, self.config)
        keys = jax.random.split(self.make_rng("dropout"), self.config.layers) if self.has_rng("dropout") else None

        def body(x: Array, layer: tuple[Params, Array | None]) -> tuple[Array, None]:
            weights, key = layer
            # Also cuts the gradient of each layer where it arises, instead of keeping it whole until the last.
            weights = jax.lax.optimization_barrier(constrain_parameters(weights, "llm/blocks"))
            rngs = {} if key is None else {"dropout": key}
            x, _ = self.block.apply({"params": weights}, named(x, INPUT), rotation, segments, rngs=rngs)
            return constrain(x, "batch", "tokens"), None

        x, _ = jax.lax.scan(remat(self.remat)(body), x, (self.blocks, keys))
        return self.norm(x)

    def prefill(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache_tokens: int
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """Forward of prompts padded on the right (`positions` = 0 .. T-1), keeping keys and values."""
        rotation = rotary(positions, self.config)

        kept = []
        for index in range(self.config.layers):  # a scan wants stacks, which decoding would copy whole
            x, pair = self.block.apply({"params": take_layer(self.blocks, index)}, x, rotation)
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
            x, layer_cache = self.block.apply({"params": layer}, x, rotation, None, positions, layer_cache)
            kept.append(layer_cache)
        return self.norm(x), tuple(kept)

    def head(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits over the vocabulary, added rows last."""
        return jnp.matmul(hidden.astype(self.dtype), self.head_kernel(), preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The matrix that makes logits of hidden states, in `dtype`, added columns last."""
        kernels = [self.embeddings["table"].T] if self.config.tie_embeddings else [self.output["kernel"]]
        if self.config.added_tokens:
            kernels.append(self.embeddings["added"].T if self.config.tie_embeddings else self.output["added"])
        parts = [kernel.astype(self.dtype) for kernel in kernels]
        return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
