"""BLIP-2's Q-Former: learned queries that look at an image's features, in BERT's post-norm layers.

Only the branch of the queries is here; the text's is not part of the systems that this project reproduces. Differs
from BLIP-2: nothing is dropped in training, where it drops a tenth; MiniGPT-4 keeps the whole frozen.
Source: LAVIS lavis/models/blip2_models/Qformer.py@506965b.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense, LayerNorm, Params, stacked, take_layer
from llava_jax.models.presets import QFormerConfig
from llava_jax.sharding import constrain


class Attend(nn.Module):
    """Attention of `x` to `source`, which is `x` itself or the image; the norm comes after the sum."""

    config: QFormerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img Q W"], source: Float[Array, "Img P C"]) -> Float[Array, "Img Q W"]:
        q, k, v = (self._heads(name, y) for name, y in (("q", x), ("k", source), ("v", source)))
        y = attention(q, k, v, rows="images").reshape(x.shape)
        y = Dense(self.config.width, True, self.dtype, self.lora_dropout, name="o")(y)
        return LayerNorm(self.config.eps, self.dtype, name="ln")(x + y)

    def _heads(self, name: str, x: Float[Array, "Img P C"]) -> Float[Array, "Img P N H"]:
        x = Dense(self.config.width, True, self.dtype, self.lora_dropout, name=name)(x)
        return x.reshape(*x.shape[:2], self.config.heads, -1)


class Mlp(nn.Module):
    """Two layers with exact GELU between them; the norm comes after the sum."""

    config: QFormerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img Q W"]) -> Float[Array, "Img Q W"]:
        y = Dense(self.config.mlp_width, True, self.dtype, self.lora_dropout, name="fc1")(x)
        y = Dense(self.config.width, True, self.dtype, self.lora_dropout, name="fc2")(nn.gelu(y, approximate=False))
        return LayerNorm(self.config.eps, self.dtype, name="ln")(x + y)


class QFormer(nn.Module):
    """An image's features -> its queries' last hidden state.

    Three stacks: `attention` and `mlp` of all layers, `cross` of those that look at the image.
    """

    config: QFormerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    def __call__(self, features: Float[Array, "Img P C"]) -> Float[Array, "Img Q W"]:
        return self.hidden_states(features, every=False)[-1]

    @nn.compact
    def hidden_states(self, features: Float[Array, "Img P C"], every: bool = True) -> list[Array]:
        """Hidden states [Img, Q, W]: the normed queries and those after each layer (or the last only)."""
        config, sizes = self.config, (self.config, self.dtype, self.lora_dropout)
        queries = self.param("queries", nn.initializers.normal(0.02), (config.queries, config.width))
        x = LayerNorm(config.eps, self.dtype, name="ln")(queries.astype(self.dtype))
        x = jnp.broadcast_to(x, (features.shape[0], *x.shape))
        attend, mlp = Attend(*sizes, parent=None), Mlp(*sizes, parent=None)
        groups, size = config.layers // config.cross_every, config.cross_every
        first = stacked(self, "cross", attend, groups, x[:1], features[:1])
        rest = (stacked(self, "attention", attend, config.layers, x[:1], x[:1]),
                stacked(self, "mlp", mlp, config.layers, x[:1]))  # fmt: skip
        rest = jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), rest)
        keys = jax.random.split(self.make_rng("dropout"), (groups, size, 3)) if self.has_rng("dropout") else None

        def body(x: Array, group: tuple[Params, tuple[Params, Params], Array | None]) -> tuple[Array, Any]:
            cross, rest, keys = group
            states = []
            for layer in range(size):
                own, feed = (take_layer(stack, layer) for stack in rest)
                rngs = [{} if keys is None else {"dropout": keys[layer, i]} for i in range(3)]
                x = attend.apply({"params": own}, x, x, rngs=rngs[0])
                if layer == 0:
                    x = attend.apply({"params": cross}, x, features, rngs=rngs[1])
                x = constrain(mlp.apply({"params": feed}, x, rngs=rngs[2]), "images")
                states.append(x)
            return x, jnp.stack(states) if every else None

        last, found = jax.lax.scan(body, x, (first, rest, keys))
        return [x, *found.reshape(-1, *x.shape)] if every else [last]
