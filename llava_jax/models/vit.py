"""CLIP's vision transformer, as far as the selected layer needs it. Source: openai/CLIP; LLaVA's clip_encoder.py."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense, LayerNorm, Params, stacked, through
from llava_jax.models.presets import TowerConfig, VisionConfig

ACTIVATIONS = {"quick_gelu": lambda x: x * nn.sigmoid(1.702 * x), "gelu": lambda x: nn.gelu(x, approximate=False)}


class VisionBlock(nn.Module):
    """Pre-norm transformer block with biases; every patch sees every patch."""

    config: VisionConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img P C"]) -> Float[Array, "Img P C"]:
        config = self.config
        heads = (*x.shape[:2], config.heads, config.width // config.heads)
        y = LayerNorm(config.eps, self.dtype, name="ln1")(x)
        q, k, v = (self._dense(name, config.width)(y).reshape(heads) for name in ("q", "k", "v"))
        y = attention(q, k, v, rows="images").reshape(x.shape)
        x = x + self._dense("o", config.width)(y)
        y = LayerNorm(config.eps, self.dtype, name="ln2")(x)
        y = ACTIVATIONS[config.act](self._dense("fc1", config.mlp_width)(y))
        return x + self._dense("fc2", config.width)(y)

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, True, self.dtype, self.lora_dropout, name=name)


class Tower(nn.Module):
    """What all vision transformers here share: patches with a class token and positions, through a stack of blocks.

    Their `setup` makes `cls`, `pos`, `patch` (a kernel, and a bias where there is one), `block` and `blocks`.
    """

    config: TowerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    def __call__(self, pixels: UInt8[Array, "Img Side Side 3"]) -> Float[Array, "Img P C"]:
        """uint8 pictures -> features: [.., patches, C], with the class token first for "cls_patch"."""
        states = self.hidden_states(pixels, every=False)
        return states[-1][:, 1:] if self.config.select_feature == "patch" else states[-1]

    def hidden_states(self, pixels: UInt8[Array, "Img Side Side 3"], every: bool = True) -> list[Array]:
        """Hidden states [Img, 1 + patches, C]: before the first block and after each that runs (or the last only)."""
        x = self._embed(normalise(pixels, self.config).astype(self.dtype))
        return through(self, self.block, self.blocks, self.config.run_layers, x, every=every)

    def _embed(self, x: Float[Array, "Img Side Side 3"]) -> Float[Array, "Img P C"]:
        x = _flat_patches(x, self.config.patch_size)
        x = x @ self.patch["kernel"].reshape(-1, self.config.width).astype(self.dtype)
        if "bias" in self.patch:
            x = x + self.patch["bias"].astype(self.dtype)
        cls = jnp.broadcast_to(self.cls.astype(self.dtype), (x.shape[0], 1, self.config.width))
        return jnp.concatenate([cls, x], axis=1) + self.pos.astype(self.dtype)


class VisionTower(Tower):
    """CLIP's, up to the hidden state `select_layer`; `vision/tail` holds what CLIP has after it and never runs here."""

    config: VisionConfig

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(0.02)
        self.cls = self.param("cls", normal, (config.width,))
        self.pos = self.param("pos", normal, (config.patches + 1, config.width))
        self.patch = self.param("patch", lambda key, shape: {"kernel": normal(key, shape)},
                                (config.patch_size, config.patch_size, 3, config.width))  # fmt: skip
        self.pre_ln = LayerNorm(config.eps, self.dtype)
        self.block = VisionBlock(config, self.dtype, self.lora_dropout, parent=None)
        example = jnp.zeros((1, 1, config.width), self.dtype)
        self.blocks = stacked(self, "blocks", self.block, config.run_layers, example)
        if self.is_initializing():
            self.param("tail", self._init_tail, example)

    def _init_tail(self, key: Array, example: Array) -> Params:
        after = self.config.layers - self.config.run_layers
        tail: dict[str, Any] = {
            "post_ln": {"scale": jnp.ones(self.config.width), "bias": jnp.zeros(self.config.width)}
        }
        if after:
            tail["blocks"] = jax.vmap(lambda k: self.block.init(k, example)["params"])(jax.random.split(key, after))
        return tail

    def _embed(self, x: Float[Array, "Img Side Side 3"]) -> Float[Array, "Img P C"]:
        return self.pre_ln(super()._embed(x))


def _flat_patches(x: Float[Array, "Img Side Side 3"], size: int) -> Float[Array, "Img P Patch"]:
    """Each patch as a row, in reading order, flattened as (row, column, channel).

    A convolution with a stride of its own size is a product with these.
    """
    images, side = x.shape[0], x.shape[1] // size
    x = x.reshape(images, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, side * side, size * size * 3)


def normalise(pixels: UInt8[Array, "*Img Side Side 3"], config: TowerConfig) -> Float[Array, "*Img Side Side 3"]:
    """(pixels / 255 - mean) / std in float32, on the device, so that the host sends a quarter of the bytes."""
    scaled = pixels.astype(jnp.float32) * jnp.float32(1 / 255)
    return (scaled - jnp.asarray(config.mean, jnp.float32)) / jnp.asarray(config.std, jnp.float32)
