"""Decoders of LLaMA's form: one scan over the stacked blocks in training, unrolled in prefill and decoding.

LLaMA, Mistral and Qwen are this with a few switches, which their files set.
"""

import operator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import attention
from llava_jax.models.cache import LayerCache, from_prefill, of_prompt
from llava_jax.models.flamingo import CrossConfig, GatedBlock, Media
from llava_jax.models.layers import Dense, Params, RMSNorm, parameter, read_layer, rotary, rotate, stacked, take_layer
from llava_jax.models.paged import PagedCache
from llava_jax.models.parts import DecoderConfig
from llava_jax.models.remat import INPUT, QKV, Remat, groups, named, remat
from llava_jax.sharding import constrain, constrain_parameters, one_cpu

# A scan of at most so many layers is unrolled on a CPU, where the arrays that a loop stacks for its backward pass cost
# 15 % of the demo's step, and compiling takes no longer (EPYC, jax 0.10.2, 2026-11-30).
FEW_LAYERS = 4
Cache = LayerCache | PagedCache
Rotation = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]


class DecoderBlock(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, RMSNorm, gated SiLU mlp."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0
    biased: ClassVar[tuple[str, ...]] = ()  # matrices with a bias
    normed: ClassVar[tuple[str, ...]] = ()  # of q, k and v, those whose heads are normed before they are rotated

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        segments: Int[Array, "B T"] | None = None,
        slots: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns the block's output and the keys and values: the new ones, or the whole cache if one was given.

        slots: where in `cache` each token is written; it sees this slot and those before.
        """
        y, kept = self.attend(RMSNorm(self.config.eps, self.dtype, name="ln1")(x), rotation, segments, slots, cache)
        x = x + y
        return x + self.feed(RMSNorm(self.config.eps, self.dtype, name="ln2")(x)), kept

    def attend(
        self, y: Float[Array, "B T D"], rotation: Rotation, segments: Any, slots: Any, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Attention of the normed input, with the keys and values that it leaves."""
        config = self.config
        q = self._heads("q", config.heads, y)
        k = self._heads("k", config.kv_heads, y)
        v = self._heads("v", config.kv_heads, y)
        q, k, v = (named(y, QKV) for y in (rotate(q, *rotation), rotate(k, *rotation), v))
        if cache is None:
            kept, y = of_prompt(k, v), attention(q, k, v, causal=True, segments=segments)
        else:
            kept, y = cache.attend(q, k, v, slots)
        return self.dense("o", config.width)(y.reshape(*y.shape[:2], -1)), kept

    def feed(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The gated mlp of the normed input."""
        y = nn.silu(self.dense("gate", self.config.mlp_width)(y)) * self.dense("up", self.config.mlp_width)(y)
        return self.dense("down", self.config.width)(y)

    def dense(self, name: str, features: int) -> Dense:
        rows = ("batch", "tokens")
        return Dense(features, name in self.biased, self.dtype, self.lora_dropout, rows=rows, name=name)

    def _heads(self, name: str, heads: int, y: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        y = self.dense(name, heads * self.config.head_width)(y)
        y = y.reshape(*y.shape[:2], heads, self.config.head_width)
        return RMSNorm(self.config.eps, self.dtype, name=f"{name}_norm")(y) if name in self.normed else y


class LanguageModel(nn.Module):
    """Embeddings in, normed hidden states out; `head` turns those into float32 logits where they are wanted.

    remat: a policy of `models.remat`, or one for each layer. cross: of gated blocks between the layers, which look at
      images of `media_rows` features each (`models.flamingo`); they want a single policy.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    lora_dropout: float = 0.0
    cross: CrossConfig | None = None
    media_rows: int = 0
    block_class: ClassVar[type[DecoderBlock]] = DecoderBlock

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(0.02)
        self.embeddings = parameter(self, "embed", self._init_rows, normal, (0, config.width))
        self.block = self.block_class(config, self.dtype, self.lora_dropout, parent=None)
        example = jnp.zeros((1, 1, config.width), self.dtype)
        place = jnp.zeros((1, 1), jnp.int32)
        self.blocks = stacked(self, "blocks", self.block, config.layers, example, rotary(place, config))
        if self.cross is not None:
            self.gated = GatedBlock(self.cross, self.media_rows, self.dtype, self.lora_dropout, parent=None)
            look = Media(jnp.zeros((1, self.media_rows, self.cross.media_width), self.dtype), place)
            self.gated_blocks = stacked(self, "cross", self.gated, config.layers // self.cross.every, example, look)
        self.norm = RMSNorm(config.eps, self.dtype)
        if not config.tie_embeddings:
            self.output = parameter(self, "head", self._init_rows, normal, (1, config.width))

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
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        media: Media | None = None,
    ) -> Float[Array, "B T D"]:
        """Full forward of rows: of several samples each, which `segments` tell apart, or (None) of a single one."""
        if self.is_initializing():  # the stacks are there, and `x` has the shape of the result
            return self.norm(x)
        rotation = rotary(positions, self.config)
        keys = jax.random.split(self.make_rng("dropout"), self.config.layers) if self.has_rng("dropout") else None

        def body(x: Array, layer: tuple[Params, Array | None]) -> tuple[Array, None]:
            weights, key = layer
            # Also cuts the gradient of each layer where it arises, instead of keeping it whole until the last.
            weights = jax.lax.optimization_barrier(constrain_parameters(weights, "llm/blocks"))
            rngs = {} if key is None else {"dropout": key}
            x, _ = self.block.apply({"params": weights}, named(x, INPUT), rotation, segments, rngs=rngs)
            return constrain(x, "batch", "tokens"), None

        if media is None:
            x = self._grouped(body, x, keys)
        else:
            x = self._between(remat(self.remat)(body), x, (self.blocks, keys), media)
        return self.norm(x)

    def _grouped(self, body: Any, x: Float[Array, "B T D"], keys: Array | None) -> Float[Array, "B T D"]:
        """All layers, a scan over each group of neighbours with the same policy."""
        parts = groups(self.remat, self.config.layers)
        if len(parts) == 1:
            policy, _, layers = parts[0]
            unrolled = policy == "none" and layers <= FEW_LAYERS and one_cpu()
            return jax.lax.scan(remat(policy)(body), x, (self.blocks, keys), unroll=unrolled)[0]
        stack = jax.lax.stop_gradient(self.blocks)

        def read(x: Array, layer: tuple[Array, Params, Array | None]) -> tuple[Array, None]:
            index, own, key = layer
            return body(x, (read_layer(stack, index, own), key))

        for policy, first, end in parts:
            part = jax.tree.map(operator.itemgetter(slice(first, end)), (self.blocks, keys))
            x, _ = jax.lax.scan(remat(policy)(read), x, (jnp.arange(first, end), *part))
        return x

    def _between(self, body: Any, x: Float[Array, "B T D"], layers: Any, media: Media) -> Float[Array, "B T D"]:
        """All layers, with a gated block before the last of each group of `cross.every`; what is left has none."""
        assert self.cross is not None
        every = self.cross.every
        groups = self.config.layers // every
        keys = jax.random.split(self.make_rng("dropout"), groups) if self.has_rng("dropout") else None

        def look(x: Array, layer: tuple[Params, Array | None]) -> tuple[Array, None]:
            weights, key = layer
            weights = jax.lax.optimization_barrier(constrain_parameters(weights, "llm/cross"))
            x, _ = self.gated.apply({"params": weights}, x, media, rngs={} if key is None else {"dropout": key})
            return constrain(x, "batch", "tokens"), None

        look = remat(self.remat)(look)

        def group(x: Array, inputs: tuple[Any, Any]) -> tuple[Array, None]:
            gated, own = inputs
            x, _ = jax.lax.scan(body, x, jax.tree.map(lambda leaf: leaf[:-1], own))
            x, _ = look(x, gated)
            return body(x, jax.tree.map(lambda leaf: leaf[-1], own))

        grouped = jax.tree.map(lambda leaf: leaf[: groups * every].reshape(groups, every, *leaf.shape[1:]), layers)
        x, _ = jax.lax.scan(group, x, ((self.gated_blocks, keys), grouped))
        x, _ = jax.lax.scan(body, x, jax.tree.map(lambda leaf: leaf[groups * every :], layers))
        return x

    def prefill(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache_tokens: int,
        media: Media | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """Forward of prompts padded on the right (`positions` = 0 .. T-1), keeping keys and values.

        The cache holds those of the layers, then those of each row's last image in the gated blocks.
        """
        rotation = rotary(positions, self.config)

        kept, looked = [], []
        for index in range(self.config.layers):  # a scan wants stacks, which decoding would copy whole
            if media is not None and self._is_gated(index):
                x, last = self._look(index, x, media)
                looked.append(last)
            x, pair = self.block.apply({"params": take_layer(self.blocks, index)}, x, rotation)
            kept.append(pair)
        return self.norm(x), (*from_prefill(kept, cache_tokens), *looked)

    def decode(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: tuple[Cache, ...]
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
        """Forward of new tokens at `positions` against the cache; usually T is 1."""
        rotation = rotary(positions, self.config)
        kept, looked = [], cache[self.config.layers :]
        for index, layer_cache in enumerate(cache[: self.config.layers]):  # a scan would hold a second copy of it all
            if looked and self._is_gated(index):
                x, _ = self._look(index, x, looked[index // self.cross.every])
            layer = take_layer(self.blocks, index)
            x, layer_cache = self.block.apply({"params": layer}, x, rotation, None, positions, layer_cache)
            kept.append(layer_cache)
        return self.norm(x), (*kept, *looked)

    def _is_gated(self, index: int) -> bool:
        return self.cross is not None and (index + 1) % self.cross.every == 0

    def _look(
        self, index: int, x: Float[Array, "B T D"], seen: Media | LayerCache
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The gated block before layer `index`."""
        weights = take_layer(self.gated_blocks, index // self.cross.every)
        return self.gated.apply({"params": weights}, x, seen)

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
