"""Flamingo's two parts: the perceiver resampler, and the gated block through which a decoder looks at images.

Source: Alayrac et al. 2022, section 2; open_flamingo/src/helpers.py@655f693.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.models import mlp
from llava_jax.models.attention import attention, attention_by_number, cached_attention
from llava_jax.models.cache import LayerCache, of_prompt
from llava_jax.models.layers import Dense, LayerNorm, parameter, stacked, through
from llava_jax.models.parts import Connector, Sizes, check


@dataclass(frozen=True)
class PerceiverConfig(Sizes):
    """Flamingo's resampler: latents that read the image's features and themselves; as wide as the tower.

    Source: open_flamingo/src/helpers.py@655f693.
    """

    latents: int = 64
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    mlp_ratio: int = 4
    eps: float = 1e-5

    @property
    def outputs(self) -> int:
        """Features that it makes of one image."""
        return self.latents


@dataclass(frozen=True)
class CrossConfig(Sizes):
    """Flamingo's gated cross-attention: a block before every `every`-th decoder layer, counted from 1.

    media_width: of the features that it looks at: the tower's.
    Source: open_flamingo/src/{helpers,flamingo_lm}.py@655f693; its released models have every 1, 2 and 4.
    """

    media_width: int
    every: int = 4
    heads: int = 8
    head_width: int = 64
    mlp_ratio: int = 4
    eps: float = 1e-5


class PerceiverBlock(nn.Module):
    """Latents look at the image's features and at themselves, then a GELU mlp; no bias but the norms'."""

    config: PerceiverConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img Q C"], features: Float[Array, "Img P C"]) -> Float[Array, "Img Q C"]:
        config, width = self.config, x.shape[-1]
        y = self._norm("ln1")(x)
        seen = jnp.concatenate([self._norm("ln_media")(features), y], axis=1)
        q, k, v = (self._heads(name, z) for name, z in (("q", y), ("k", seen), ("v", seen)))
        y = attention(q, k, v, rows="images").reshape(*x.shape[:2], -1)
        x = x + self._dense("o", width)(y)
        y = self._dense("fc1", config.mlp_ratio * width)(self._norm("ln2")(x))
        return x + self._dense("fc2", width)(nn.gelu(y, approximate=False))

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.eps, self.dtype, name=name)

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, dtype=self.dtype, dropout=self.lora_dropout, name=name)

    def _heads(self, name: str, x: Float[Array, "Img P C"]) -> Float[Array, "Img P N H"]:
        x = self._dense(name, self.config.heads * self.config.head_width)(x)
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_width)


class Perceiver(nn.Module):
    """An image's features -> as many as there are latents, of the same width."""

    config: PerceiverConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "Img P C"]) -> Float[Array, "Img Q C"]:
        config, (images, _, width) = self.config, features.shape
        latents = parameter(self, "latents", nn.initializers.normal(1.0), (config.latents, width))
        x = jnp.broadcast_to(latents.astype(self.dtype), (images, *latents.shape))
        block = PerceiverBlock(config, self.dtype, self.lora_dropout, parent=None)
        blocks = stacked(self, "blocks", block, config.layers, x[:1], features[:1])
        (x,) = through(self, block, blocks, config.layers, x, features)
        return LayerNorm(config.eps, self.dtype, name="norm")(x)


class Media(NamedTuple):
    """What gated blocks look at.

    features: of each group's images, M rows an image, image after image.
    seen: the image of its group that each token sees, or -1.
    """

    features: Float[Array, "G Rows C"]
    seen: Int[Array, "B T"]


def media(
    features: Float[Array, "G Rows C"], image_slots: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Media:
    """Every token sees the last image at or before it in its own sample.

    image_slots: the image at its mark's position; what it says elsewhere is -1, or already the image that is seen.
    """
    places = jnp.where(image_slots >= 0, jnp.arange(image_slots.shape[1]), -1)
    last = jax.lax.cummax(places, axis=1)
    at = jnp.maximum(last, 0)
    fine = last >= 0
    if segments is not None:
        fine &= jnp.take_along_axis(segments, at, axis=1) == segments
    return Media(features, jnp.where(fine, jnp.take_along_axis(image_slots, at, axis=1), -1))


class GatedBlock(nn.Module):
    """x + tanh(attn_gate) attention to an image, then x + tanh(ff_gate) mlp; both gates start at 0.

    A token that has seen no image gets nothing from the attention; the mlp is for all.
    """

    config: CrossConfig
    rows: int  # M, features of an image
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], seen: Media | LayerCache) -> tuple[Float[Array, "B T D"], LayerCache]:
        """seen: the images; or, for tokens that are decoded, keys and values of each row's last one, all 0 where there
        is none. Returns the output, and the latter."""
        config, width = self.config, x.shape[-1]
        q = self._heads("q", LayerNorm(config.eps, self.dtype, name="ln1")(x))
        if isinstance(seen, LayerCache):
            all_keys = jnp.full(x.shape[:2], self.rows - 1, jnp.int32)
            last, y = seen, cached_attention(q, seen.k, seen.v, all_keys)
        else:
            k, v = self._heads("k", seen.features), self._heads("v", seen.features)
            last, y = self._last(k, v, seen.seen), self._look(q, k, v, seen.seen)
        gates = [parameter(self, name, nn.initializers.zeros, ()) for name in ("attn_gate", "ff_gate")]
        attn_gate, ff_gate = (jnp.tanh(gate.astype(jnp.float32)).astype(self.dtype) for gate in gates)
        x = x + attn_gate * self._dense("o", width)(y.reshape(*x.shape[:2], -1))
        y = self._dense("fc1", config.mlp_ratio * width)(LayerNorm(config.eps, self.dtype, name="ln2")(x))
        return x + ff_gate * self._dense("fc2", width)(nn.gelu(y, approximate=False)), last

    def _look(self, q: Array, k: Array, v: Array, seen: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        """Each token's attention to the image that it sees; the rows of a group share its images."""
        groups, rows = k.shape[:2]
        of_keys = jnp.broadcast_to(jnp.arange(rows) // self.rows, (groups, rows))
        grouped = q.reshape(groups, -1, *q.shape[2:])
        return attention_by_number(grouped, k, v, seen.reshape(groups, -1), of_keys).reshape(q.shape)

    def _last(self, k: Array, v: Array, seen: Int[Array, "B T"]) -> LayerCache:
        image = seen[:, -1]  # padding on the right sees what the last token sees
        groups, (heads, width) = k.shape[0], k.shape[2:]

        def of_rows(x: Array) -> Array:
            images = x.reshape(groups, -1, self.rows, heads, width)
            chosen = jnp.take_along_axis(
                images, jnp.maximum(image, 0).reshape(groups, -1)[:, :, None, None, None], axis=1
            )
            return jnp.where((image >= 0)[:, None, None, None], chosen.reshape(-1, self.rows, heads, width), 0)

        return of_prompt(of_rows(k), of_rows(v))

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, dtype=self.dtype, dropout=self.lora_dropout, name=name)

    def _heads(self, name: str, x: Float[Array, "B T In"]) -> Float[Array, "B T N H"]:
        x = self._dense(name, self.config.heads * self.config.head_width)(x)
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_width)


def _check_gated(config: Any) -> None:
    check(config.cross is not None, "cross", config.cross, 'one for "flamingo_xattn"')
    check(config.cross.media_width == config.vision.width, "cross.media_width", config.cross.media_width,
          f"the tower's width={config.vision.width}")  # fmt: skip
    check(1 <= config.cross.every <= config.llm.layers, "cross.every", config.cross.every,
          f"between 1 and the decoder's layers={config.llm.layers}")  # fmt: skip
    check(not config.image_newline, "image_newline", config.image_newline, "False: no token stands for features")


PERCEIVER = Connector(
    name="perceiver", shown="perceiver", module=mlp.Projector, rows=mlp.rows,
    features=lambda config: config.resampler.outputs, resampler=PerceiverConfig, resampler_module=Perceiver,
)  # fmt: skip
FLAMINGO = Connector(  # 1 position: that of the image's mark, an ordinary token
    name="flamingo_xattn", shown="flamingo_xattn", module=mlp.Identity, rows=lambda projector, prefix: [],
    features=lambda config: 1, resampler=PerceiverConfig, resampler_module=Perceiver, check=_check_gated, gated=True,
)  # fmt: skip
PARTS = (PERCEIVER, FLAMINGO)
