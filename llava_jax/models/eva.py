"""EVA-CLIP's vision transformer (ViT-g/14), as BLIP-2 and MiniGPT-4 read it: the residual stream after its last block.

Differs from CLIP's in `vit`: no norm before or after the blocks, a bias of the patches, one matrix for queries, keys
and values, and no bias of the keys. Source: LAVIS lavis/models/eva_vit.py@506965b.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense, LayerNorm, stacked
from llava_jax.models.presets import EvaConfig
from llava_jax.models.vit import Tower


class EvaBlock(nn.Module):
    """Pre-norm transformer block with exact GELU; every patch sees every patch."""

    config: EvaConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img P C"]) -> Float[Array, "Img P C"]:
        config = self.config
        heads = (*x.shape[:2], config.heads, config.width // config.heads)
        y = LayerNorm(config.eps, self.dtype, name="ln1")(x)
        y = Dense(3 * config.width, False, self.dtype, self.lora_dropout, name="qkv")(y)
        q, k, v = jnp.split(y, 3, axis=-1)
        q, v = q + self._bias("q"), v + self._bias("v")
        y = attention(q.reshape(heads), k.reshape(heads), v.reshape(heads), rows="images").reshape(x.shape)
        x = x + self._dense("o", config.width)(y)
        y = LayerNorm(config.eps, self.dtype, name="ln2")(x)
        y = nn.gelu(self._dense("fc1", config.mlp_width)(y), approximate=False)
        return x + self._dense("fc2", config.width)(y)

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, True, self.dtype, self.lora_dropout, name=name)

    def _bias(self, name: str) -> Float[Array, "C"]:
        return self.param(name, lambda key: {"bias": jnp.zeros(self.config.width)})["bias"].astype(self.dtype)


class EvaTower(Tower):
    """Pixels to the features of the last block."""

    config: EvaConfig

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(0.02)
        self.cls = self.param("cls", normal, (config.width,))
        self.pos = self.param("pos", normal, (config.patches + 1, config.width))
        self.patch = self.param("patch", self._init_patch, normal)
        self.block = EvaBlock(config, self.dtype, self.lora_dropout, parent=None)
        self.blocks = stacked(self, "blocks", self.block, config.layers, jnp.zeros((1, 1, config.width), self.dtype))

    def _init_patch(self, key: Array, init: Any) -> dict[str, Array]:
        size, width = self.config.patch_size, self.config.width
        return {"kernel": init(key, (size, size, 3, width)), "bias": jnp.zeros(width)}
