"""CLIP's vision transformer of any size: a class token, and a norm before the first block. Source: openai/CLIP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Array, Float

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import vit
from llava_jax.models.layers import LayerNorm
from llava_jax.models.names import SAME, Row, norm
from llava_jax.models.parts import Content, Tower
from llava_jax.models.vit import HiddenStateTower, VisionConfig

# Defaults of transformers' CLIPVisionConfig, which config.json may leave out. Source: transformers 4.57.6 and 5.23.0.
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_TYPES = ("clip_vision_model", "clip")  # of a tower, and of a whole CLIP
L14_224 = VisionConfig(image_size=224, patch_size=14, width=1024, mlp_width=4096, layers=24, heads=16)
L14_336 = replace(L14_224, image_size=336)


class ClipTower(HiddenStateTower):
    """Pixels to the hidden state `select_layer`."""

    def setup(self) -> None:
        super().setup()
        self.pre_ln = LayerNorm(self.config.eps, self.dtype)

    def _embed(self, x: Float[Array, "Img Side Side 3"]) -> Float[Array, "Img P C"]:
        return self.pre_ln(super()._embed(x))


def rows(prefix: str) -> list[Row]:
    """The table of a tower whose tensors begin with `prefix` (`vision_model.`)."""
    return [
        ("vision/cls", (prefix + "embeddings.class_embedding", SAME)),
        *norm("vision/pre_ln", prefix + "pre_layrnorm"),  # their spelling
        *vit.rows(prefix),
    ]


def whole_or_part(content: Content, where: str) -> Content:
    """The tower's own object in the config.json of a two-tower model; a tower's own config.json as it is.

    Raises:
      UnusableCheckpoint: its `vision_config` is no object.
    """
    inner = content.get("vision_config", content)
    old = content.get("vision_config_dict") or {}
    if not isinstance(inner, Mapping) or not isinstance(old, Mapping):
        found = old if isinstance(inner, Mapping) else inner
        raise UnusableCheckpoint(f"{where}: vision_config is {str(found)[:60]!r}; wanted an object of a tower's sizes")
    if "vision_config" in content and content.get("model_type") == "clip":
        # Old CLIP configs keep the sizes in vision_config_dict too, which wins. Source: transformers CLIPConfig.
        return {**inner, **old}
    return inner


def read_config(content: Content, where: str, select_layer: int, select_feature: str) -> VisionConfig:
    """A tower's config.

    Args:
      content: `config.json` of a CLIP model or of its vision part, or LLaVA's `vision_config`.
      where: the file, for messages.

    Raises:
      UnusableCheckpoint: not a CLIP tower as `models` has it.
    """
    inner = whole_or_part(content, where)
    kind = inner.get("model_type", _TYPES[0])
    if kind not in _TYPES:
        raise UnusableCheckpoint(f"{where}: vision model_type {kind!r}; wanted {_TYPES[0]}")
    values = {**_DEFAULTS, **inner}
    vit.check_json(values, where, select_layer)
    return VisionConfig(
        **vit.sizes_of(values), act=values["hidden_act"], select_layer=select_layer, select_feature=select_feature
    )


def config_json(config: VisionConfig) -> dict[str, Any]:
    """The `vision_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": "clip_vision_model",
        **vit.sizes_json(config),
        "num_channels": 3,
        "projection_dim": config.width,
        "hidden_act": config.act,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "vocab_size": 32000,
    }


PART = Tower(
    kind="clip", label="a CLIP", config=VisionConfig, module=ClipTower, model_types=_TYPES,
    mark="embeddings.class_embedding", rows=rows, read_config=read_config, config_json=config_json,
    first_layers=vit.first_layers,
    gguf=[("vision/cls", ("v.class_embd", SAME)), *norm("vision/pre_ln", "v.pre_ln"), *vit.GGUF_ROWS],
    # The only towers that the original code fetches by name and whose sizes are known here.
    hub={"openai/clip-vit-large-patch14-336": L14_336, "openai/clip-vit-large-patch14": L14_224},
    # What CLIP directories hold beside the tower, and buffers of older transformers.
    ignored=(
        r".*\bposition_ids", r"text_model\..*", r"text_projection\..*", r"visual_projection\..*", "logit_scale"
    ),
)  # fmt: skip
