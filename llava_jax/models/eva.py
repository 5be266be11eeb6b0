"""EVA-CLIP's vision transformer (ViT-g/14), as BLIP-2 and MiniGPT-4 read it: the residual stream after its last block.

Differs from CLIP's: no norm before or after the blocks, a bias of the patches, one matrix for queries, keys and values,
and no bias of the keys. Hugging Face keeps one bias for all three; `convert` reads it as two and writes it as one.
Source: LAVIS lavis/models/eva_vit.py@506965b.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import vit
from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense, LayerNorm, parameter, stacked
from llava_jax.models.names import CELL, LINEAR, PATCH, ROW, SAME, Row, linear, norm
from llava_jax.models.parts import Content, Tower, TowerConfig, check_fixed
from llava_jax.models.vit import VisionTransformer


@dataclass(frozen=True)
class EvaConfig(TowerConfig):
    """EVA-CLIP's vision transformer as BLIP-2 uses it: all `layers` run, without a norm before or after them.

    layers: 39 of the 40 that EVA released, since BLIP-2 reads the second-last hidden state.
    select_feature: BLIP-2's Q-Former also reads the class token.
    """

    eps: float = 1e-6
    select_feature: str = "cls_patch"


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
        return parameter(self, name, lambda _: {"bias": jnp.zeros(self.config.width)})["bias"].astype(self.dtype)


class EvaTower(VisionTransformer):
    """Pixels to the features of the last block."""

    config: EvaConfig
    patch_bias: ClassVar[bool] = True

    def setup(self) -> None:
        config = self.config
        self.embeddings()
        self.block = EvaBlock(config, self.dtype, self.lora_dropout, parent=None)
        self.blocks = stacked(self, "blocks", self.block, config.layers, jnp.zeros((1, 1, config.width), self.dtype))


HUB_PREFIX, LAVIS_PREFIX = "vision_model.", "visual_encoder."
HEAD_WIDTH = 88  # Source: LAVIS create_eva_vit_g: num_heads=1408 // 88; the files do not say it
# What the files of the released tower, of LAVIS's models and of other parts of BLIP-2 hold beside the blocks that run.
LAVIS_IGNORED = (r"(?:visual_encoder\.)?(?:norm|fc_norm|head)\..*",)
_DEFAULTS = {  # of transformers' Blip2VisionConfig. Source: transformers 4.57.6 and 5.23.0.
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
_FIXED = {"hidden_act": "gelu", "qkv_bias": True}


class Names(NamedTuple):
    """How tensors are called, after the prefix; `layer` is the beginning of a block's."""

    cls: str
    pos: str
    patch: str
    layer: str
    norm: str
    qkv: str
    biases: str
    output: str


LAVIS = Names(
    "cls_token", "pos_embed", "patch_embed.proj.", "blocks.{layer}.", r"norm\1", "attn.qkv.weight", r"attn.\1_bias",
    "attn.proj",
)  # fmt: skip
HUB = Names(
    "embeddings.class_embedding", "embeddings.position_embedding", "embeddings.patch_embedding.",
    "encoder.layers.{layer}.", r"layer_norm\1", "self_attn.qkv.weight", r"self_attn.qkv.\1_bias",
    "self_attn.projection",
)  # fmt: skip


def rows(names: Names, prefix: str) -> list[Row]:
    """The table of a tower whose tensors begin with `prefix`."""
    layer = prefix + names.layer
    table: list[Row] = [
        ("vision/cls", (prefix + names.cls, CELL)),
        ("vision/pos", (prefix + names.pos, ROW)),
        ("vision/patch/kernel", (prefix + names.patch + "weight", PATCH)),
        ("vision/patch/bias", (prefix + names.patch + "bias", SAME)),
        ("vision/blocks/qkv/kernel", (layer + names.qkv, LINEAR)),
        ("vision/blocks/([qv])/bias", (layer + names.biases, SAME)),
    ]
    table += linear("vision/blocks/o", layer + names.output)
    table += linear("vision/blocks/(fc[12])", layer + r"mlp.\1")
    table += norm("vision/blocks/ln([12])", layer + names.norm)
    return table


def read_config(content: Content, where: str, select_layer: int, select_feature: str) -> EvaConfig:
    """A tower's config from transformers' `vision_config`; the hidden state is always the last.

    Raises:
      UnusableCheckpoint: not a tower as `models` has it.
    """
    values = {**_DEFAULTS, **content}
    check_fixed(values, _FIXED, where, "BLIP-2")
    vit.check_json({"num_channels": 3, **values}, where)
    return EvaConfig(**vit.sizes_of(values), select_feature=select_feature)


def config_json(config: EvaConfig) -> dict[str, Any]:
    """The `vision_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": "blip_2_vision_model",
        **vit.sizes_json(config),
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "qkv_bias": True,
    }


def read_lavis_config(
    shapes: Mapping[str, tuple[int, ...]], where: str, select_feature: str
) -> tuple[EvaConfig, str, tuple[str, ...]]:
    """(config, prefix, patterns of names that are not for it) of a file with LAVIS's names.

    The tower as EVA released it, without prefix, has one block more than runs; a LAVIS model's own has not.

    Raises:
      UnusableCheckpoint: no EVA ViT is in it, or not one as `models` has it.
    """
    prefix = LAVIS_PREFIX if LAVIS_PREFIX + LAVIS.cls in shapes else ""
    found = map(re.compile(re.escape(prefix) + r"blocks\.(\d+)\..*").fullmatch, shapes)
    blocks = {int(match[1]) for match in found if match}
    layers = len(blocks) if prefix else len(blocks) - 1
    try:
        width, _, patch_size, _ = shapes[f"{prefix}{LAVIS.patch}weight"]
        _, positions, _ = shapes[prefix + LAVIS.pos]
        mlp_width, _ = shapes[f"{prefix}blocks.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        shown = ", ".join(list(shapes)[:3])
        raise UnusableCheckpoint(f"{where}: no EVA ViT here; its tensors are such as {shown}") from None
    side = round((positions - 1) ** 0.5)
    if side * side + 1 != positions or width % HEAD_WIDTH or layers < 1:
        raise UnusableCheckpoint(
            f"{where}: {positions} positions, width {width}, {layers} blocks to run; wanted a square and one "
            f"more, a multiple of {HEAD_WIDTH}, at least 1"
        )
    config = EvaConfig(
        image_size=side * patch_size, patch_size=patch_size, width=width, mlp_width=mlp_width, layers=layers,
        heads=width // HEAD_WIDTH, select_feature=select_feature,
    )  # fmt: skip
    return config, prefix, (rf"{prefix}blocks\.{layers}\..*", *LAVIS_IGNORED)


# Source: LAVIS create_eva_vit_g (width 1408, 16 heads of 88, mlp int(1408 * 4.3637)).
G14_224 = EvaConfig(image_size=224, patch_size=14, width=1408, mlp_width=6144, layers=39, heads=16)

PART = Tower(
    kind="eva", label="an EVA", config=EvaConfig, module=EvaTower, model_types=("blip_2_vision_model",),
    mark="self_attn.qkv.weight", rows=partial(rows, HUB), read_config=read_config, config_json=config_json,
    ignored=LAVIS_IGNORED, processor="BlipImageProcessor",
)  # fmt: skip
