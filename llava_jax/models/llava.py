"""LLaVA, from pictures and tokens to hidden states: features of the tower go through the connector to their slots."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.batch import Corners
from llava_jax.models import flamingo, registry
from llava_jax.models.cache import LayerCache
from llava_jax.models.decoder import Cache
from llava_jax.models.layers import LayerNorm, parameter
from llava_jax.models.presets import LlavaConfig
from llava_jax.models.remat import Remat
from llava_jax.sharding import constrain


class Llava(nn.Module):
    """Vision tower, connector and decoder; fields of a `Batch` in, hidden states out.

    dtype: the dtype of all matrix products; norms, scores, softmax and logits are float32 inside.
    remat: rematerialisation of the decoder's blocks (`models.remat`), of all or of each; vision_remat: of the tower's,
      which needs some where it is trained.
    lora_dropout: of the inputs of adapters, where a "dropout" rng is given.
    """

    config: LlavaConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    lora_dropout: float = 0.0
    vision_remat: str = "none"

    def setup(self) -> None:
        config, sizes = self.config, (self.dtype, self.lora_dropout)
        self.vision = registry.tower_of(config.vision).module(config.vision, *sizes, self.vision_remat)
        if config.ln_vision_eps is not None:
            self.ln_vision = LayerNorm(config.ln_vision_eps, self.dtype)
        connector = registry.connector(config.projector)
        self.resampler = None if config.resampler is None else connector.resampler_module(config.resampler, *sizes)
        self.projector = connector.module(config.projector, config.llm.width, *sizes)
        looked_at = 0 if config.cross is None else config.resampler.outputs
        decoder = registry.decoder_of(config.llm).module
        self.llm = decoder(config.llm, self.dtype, self.remat, self.lora_dropout, config.cross, looked_at)
        if config.image_newline:
            # Source: LLaVA llava_arch.py: normal, scaled by 1 / sqrt(D).
            init = nn.initializers.normal(config.llm.width**-0.5)
            self.newline = parameter(self, "image_newline", init, (config.llm.width,))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        image_slots: Int[Array, "B T"],
        pixels: UInt8[Array, "G I Side Side 3"],
        corners: Corners | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of a training batch; `head` makes logits of those that are wanted.

        segments: None says that every row holds one sample and nothing but padding after it.
        """
        features = self.encode_images(pixels)
        if self.config.cross is not None:
            return self.llm(
                self.llm.embed(tokens), positions, segments, flamingo.media(features, image_slots, segments)
            )
        return self.llm(self.embed(tokens, image_slots, features, corners), positions, segments)

    def encode_images(self, pixels: UInt8[Array, "G I Side Side 3"]) -> Float[Array, "G Slots D"]:
        """Features of each group's pictures as the decoder takes them: row i * N + p, `image_newline` last if there is
        one. For "flamingo_xattn" they keep the tower's width, and N is that of its resampler."""
        groups, images = pixels.shape[:2]
        flat = constrain(pixels.reshape(groups * images, *pixels.shape[2:]), "images")
        features = constrain(self.projector(self._resampled(self.vision(flat))), "images")
        features = constrain(features.reshape(groups, images * features.shape[1], features.shape[2]), "batch")
        if not self.config.image_newline:
            return features
        newline = jnp.broadcast_to(self.newline.astype(self.dtype), (groups, 1, features.shape[-1]))
        return jnp.concatenate([features, newline], axis=1)

    def _resampled(self, x: Float[Array, "Img P C"]) -> Float[Array, "Img N Wide"]:
        """All of the connector that has a place of its own before `projector`."""
        if self.config.ln_vision_eps is not None:
            x = self.ln_vision(x)
        return x if self.resampler is None else self.resampler(x)

    def embed(
        self, tokens: Int[Array, "B T"], image_slots: Int[Array, "B T"], features: Float[Array, "G Slots D"],
        corners: Corners | None = None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """Token embeddings, with feature `image_slots` of the row's group wherever that is not -1, or with the mean of
        four `corners` (summed in float32).

        The gather stays inside a group: an index across the batch would cost collectives on a mesh.
        """

        def gathered(slots: Int[Array, "B T"]) -> Float[Array, "B T D"]:
            of_group = jnp.maximum(slots, 0).reshape(features.shape[0], -1)
            return jnp.take_along_axis(features, of_group[..., None], axis=1).reshape(*tokens.shape, -1)

        if corners is None:
            shown = gathered(image_slots)
        else:
            parts = (gathered(corners.slots[..., i]) * corners.weights[..., i, None] for i in range(4))
            shown = sum(parts, jnp.float32(0)).astype(features.dtype)
        x = jnp.where((image_slots >= 0)[..., None], shown, self.llm.embed(tokens))
        return constrain(x, "batch", "tokens")

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        image_slots: Int[Array, "B T"],
        pixels: UInt8[Array, "G I Side Side 3"] | None,
        cache_tokens: int,
        corners: Corners | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """Hidden states of prompts padded on the right, and the cache; `pixels` None for text alone."""
        if self.config.cross is not None:
            return self.llm.prefill(
                self.llm.embed(tokens), positions, cache_tokens, self._prompt_media(image_slots, pixels)
            )
        if pixels is None:
            x = self.llm.embed(tokens)
        else:
            x = self.embed(tokens, image_slots, self.encode_images(pixels), corners)
        return self.llm.prefill(x, positions, cache_tokens)

    def _prompt_media(self, image_slots: Array, pixels: Array | None) -> flamingo.Media:
        """Of a prompt without pictures no token sees any, but the gated blocks' mlp is for all tokens."""
        if pixels is not None:
            return flamingo.media(self.encode_images(pixels), image_slots, None)
        rows, width = self.config.resampler.outputs, self.config.cross.media_width
        nothing = jnp.zeros((image_slots.shape[0], rows, width), self.dtype)
        return flamingo.Media(nothing, jnp.full_like(image_slots, -1))

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: tuple[Cache, ...]
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
        """Hidden states of new tokens at `positions`, and the cache with them in it."""
        return self.llm.decode(self.llm.embed(tokens), positions, cache)

    def extend(
        self, tokens: Int[Array, "B T"], features: Float[Array, "B T D"], is_feature: Bool[Array, "B T"],
        positions: Int[Array, "B T"], cache: tuple[Cache, ...],
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:  # fmt: skip
        """As `decode` for a part of a prompt, with image features, which are there already, in place of some tokens."""
        x = jnp.where(is_feature[..., None], features, self.llm.embed(tokens))
        return self.llm.decode(x, positions, cache)

    def head(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits of hidden states."""
        return self.llm.head(hidden)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The matrix behind `head`, for a loss that never holds the logits of a whole row."""
        return self.llm.head_kernel()


@functools.partial(jax.jit, static_argnums=0)  # who wants shapes and who wants values trace it once
def init_params(config: LlavaConfig, key: Array) -> dict[str, Any]:
    """Random float32 parameters of a whole model: `{"vision": ..., "projector": ..., "llm": ...}`, and `ln_vision` and
    `resampler` where the connector has them."""
    side = config.vision.image_size
    row = jnp.zeros((1, 1), jnp.int32)
    pixels = jnp.zeros((1, 1, side, side, 3), jnp.uint8)
    return Llava(config).init(key, row, row, row, row, pixels)["params"]


def abstract_params(config: LlavaConfig) -> dict[str, Any]:
    """Names, shapes and dtypes of `init_params` without any array."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
