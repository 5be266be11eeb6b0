"""SigLIP's vision transformer, and SigLIP2's of fixed resolution: no class token, a bias of the patches.

Source: big_vision models/vit.py; transformers modeling_siglip.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import clip, vit
from llava_jax.models.layers import Params
from llava_jax.models.names import CELL, LINEAR, SAME, Row, linear, norm
from llava_jax.models.parts import Content, Tower, check, check_choice
from llava_jax.models.vit import HiddenStateTower, VisionConfig

HALF = (0.5, 0.5, 0.5)
_TYPES = ("siglip_vision_model", "siglip")
# Defaults of transformers' SiglipVisionConfig. Source: transformers 4.57.6 and 5.23.0.
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}  # fmt: skip


@dataclass(frozen=True)
class SiglipConfig(VisionConfig):
    """pooled: its files hold the attention pooling after the last block, which no feature of a patch passes."""

    eps: float = 1e-6
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    act: str = "gelu_pytorch_tanh"
    pooled: bool = True
    cut_edge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.select_feature == "patch", "select_feature", self.select_feature, "patch: it has no class token")


class SiglipTower(HiddenStateTower):
    """Pixels to the hidden state `select_layer`."""

    config: SiglipConfig
    class_token: ClassVar[bool] = False
    patch_bias: ClassVar[bool] = True

    def init_tail(self, key: Array, example: Array) -> Params:
        tail = super().init_tail(key, example)
        if not self.config.pooled:
            return tail
        width, wide = self.config.width, self.config.mlp_width
        keys = iter(jax.random.split(key, 5))

        def dense(inputs: int, outputs: int) -> Params:
            return {"kernel": 0.02 * jax.random.normal(next(keys), (inputs, outputs)), "bias": jnp.zeros(outputs)}

        return tail | {"head": {
            "probe": 0.02 * jax.random.normal(next(keys), (width,)), "qkv": dense(width, 3 * width),
            "o": dense(width, width), "ln": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "fc1": dense(width, wide), "fc2": dense(wide, width),
        }}  # fmt: skip


def rows(prefix: str) -> list[Row]:
    """The table of a tower whose tensors begin with `prefix` (`vision_model.`)."""
    head = prefix + "head."
    return [
        ("vision/patch/bias", (prefix + "embeddings.patch_embedding.bias", SAME)),
        ("vision/tail/head/probe", (head + "probe", CELL)),
        ("vision/tail/head/qkv/kernel", (head + "attention.in_proj_weight", LINEAR)),
        ("vision/tail/head/qkv/bias", (head + "attention.in_proj_bias", SAME)),
        *linear("vision/tail/head/o", head + "attention.out_proj"),
        *norm("vision/tail/head/ln", head + "layernorm"),
        *linear("vision/tail/head/(fc[12])", head + r"mlp.\1"),
        *vit.rows(prefix),
    ]


def read_config(content: Content, where: str, select_layer: int, select_feature: str) -> SiglipConfig:
    """A tower's config, of config.json of a SigLIP or of its vision part, or of LLaVA's `vision_config`.

    Raises:
      UnusableCheckpoint: not a SigLIP tower as `models` has it.
    """
    values = {**_DEFAULTS, **clip.whole_or_part(content, where)}
    kind = values.get("model_type", _TYPES[0])
    if kind not in _TYPES:
        raise UnusableCheckpoint(f"{where}: vision model_type {kind!r}; wanted {_TYPES[0]}")
    vit.check_json(values, where, select_layer)
    check_choice(values, "vision_use_head", (True, False), where)
    return SiglipConfig(
        **vit.sizes_of(values), act=values["hidden_act"], select_layer=select_layer, select_feature=select_feature,
        pooled=values["vision_use_head"],
    )  # fmt: skip


def config_json(config: SiglipConfig) -> dict[str, Any]:
    """The `vision_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": _TYPES[0],
        **vit.sizes_json(config),
        "num_channels": 3,
        "hidden_act": config.act,
        "vision_use_head": config.pooled,
    }


def kept(config: SiglipConfig) -> SiglipConfig:
    """A tower as LLaVA-NeXT keeps it: without its last block and its head, and the last hidden state is taken whatever
    `mm_vision_select_layer` says. Source: LLaVA-NeXT llava/model/multimodal_encoder/siglip_encoder.py@df17966."""
    return replace(config, layers=max(config.layers - 1, 1), select_layer=-1, pooled=False)


# Source: config.json of these models.
SO400M_384 = SiglipConfig(image_size=384, patch_size=14, width=1152, mlp_width=4304, layers=27, heads=16)
SO400M_384_KEPT = kept(SO400M_384)  # OneVision's
SIGLIP2_SO400M_384 = replace(SO400M_384, patch_size=16, resample="bilinear")

PART = Tower(
    kind="siglip", label="a SigLIP", config=SiglipConfig, module=SiglipTower, model_types=_TYPES,
    mark="embeddings.patch_embedding.bias", rows=rows, read_config=read_config, config_json=config_json,
    class_token=False, first_layers=vit.first_layers,
    gguf=[("vision/patch/bias", ("v.patch_embd.bias", SAME)), *vit.GGUF_ROWS],
    hub={"google/siglip-so400m-patch14-384": SO400M_384, "google/siglip2-so400m-patch16-384": SIGLIP2_SO400M_384},
    kept=kept, ignored=(r".*\bposition_ids", r"text_model\..*", "logit_scale", "logit_bias"),
    hub_class="SiglipVisionModel", processor="SiglipImageProcessor",
)  # fmt: skip
