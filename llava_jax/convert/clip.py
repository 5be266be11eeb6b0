"""CLIP vision towers of Hugging Face: names of their tensors, and their config.json, both ways."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax.convert import unread
from llava_jax.convert.files import TensorFiles, check_numbers, open_tensors, read_json
from llava_jax.convert.table import LINEAR, PATCH, SAME, Row
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.presets import CLIP_L14_224, CLIP_L14_336, TowerConfig, VisionConfig

# What CLIP directories hold beside the tower, and buffers of older transformers.
IGNORED = (
    r".*\bposition_ids",
    r"text_model\..*",
    r"text_projection\..*",
    r"visual_projection\..*",
    "logit_scale",
)
# The only towers that the original code fetches by name and whose sizes are known here.
HUB_TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_L14_336, "openai/clip-vit-large-patch14": CLIP_L14_224}
# Defaults of transformers' CLIPVisionConfig, which config.json may leave out. Source: transformers 4.57.6 and 5.23.0.
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
KINDS = ("clip_vision_model", "clip")  # model_type of a tower, and of a whole CLIP
# What every tower's config has, CLIP's and BLIP-2's.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def rows(prefix: str) -> list[Row]:
    """The table of a tower whose tensors begin with `prefix` (`vision_model.`)."""
    blocks, layer = "vision/(?:tail/)?blocks", prefix + "encoder.layers.{layer}."
    kinds = (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
    table: list[Row] = [
        ("vision/cls", (prefix + "embeddings.class_embedding", SAME)),
        ("vision/patch/kernel", (prefix + "embeddings.patch_embedding.weight", PATCH)),
        ("vision/pos", (prefix + "embeddings.position_embedding.weight", SAME)),
    ]
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        table += [
            (f"vision/pre_ln/{ours}", (f"{prefix}pre_layrnorm.{theirs}", SAME)),  # their spelling
            (f"vision/tail/post_ln/{ours}", (f"{prefix}post_layernorm.{theirs}", SAME)),
            (f"{blocks}/ln([12])/{ours}", (layer + rf"layer_norm\1.{theirs}", SAME)),
        ]
    for ours, theirs, axes in kinds:
        table += [
            (f"{blocks}/([qkv])/{ours}", (layer + rf"self_attn.\1_proj.{theirs}", axes)),
            (f"{blocks}/o/{ours}", (layer + f"self_attn.out_proj.{theirs}", axes)),
            (f"{blocks}/(fc[12])/{ours}", (layer + rf"mlp.\1.{theirs}", axes)),
        ]
    return table


def first_layers(config: TowerConfig) -> dict[str, int]:
    """Where the stacks of a tower begin in their numbering; only a CLIP keeps blocks that do not run."""
    return {"vision/tail/": config.run_layers}


def read_config(content: Mapping[str, Any], where: str, select_layer: int, select_feature: str) -> VisionConfig:
    """A tower's config.

    Args:
      content: `config.json` of a CLIP model or of its vision part, or LLaVA's `vision_config`.
      where: the file, for messages.

    Raises:
      UnusableCheckpoint: not a CLIP tower as `models` has it.
    """
    inner = content.get("vision_config", content)
    old = content.get("vision_config_dict") or {}
    if not isinstance(inner, Mapping) or not isinstance(old, Mapping):
        found = old if isinstance(inner, Mapping) else inner
        raise UnusableCheckpoint(f"{where}: vision_config is {str(found)[:60]!r}; wanted an object of a tower's sizes")
    kind = inner.get("model_type", "clip_vision_model")
    if kind not in KINDS:
        raise UnusableCheckpoint(f"{where}: vision model_type {kind!r}; wanted clip_vision_model")
    if "vision_config" in content and content.get("model_type") == "clip":
        # Old CLIP configs keep the sizes in vision_config_dict too, which wins. Source: transformers CLIPConfig.
        inner = {**inner, **old}
    values = {**_DEFAULTS, **inner}
    if values["num_channels"] != 3:
        raise UnusableCheckpoint(f"{where}: num_channels {values['num_channels']}; wanted 3")
    check_numbers(values, SIZES, "layer_norm_eps", where)
    return VisionConfig(
        image_size=values["image_size"], patch_size=values["patch_size"], width=values["hidden_size"],
        mlp_width=values["intermediate_size"], layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"], act=values["hidden_act"], eps=values["layer_norm_eps"],
        select_layer=select_layer, select_feature=select_feature,
    )  # fmt: skip


def config_json(config: VisionConfig) -> dict[str, Any]:
    """The `vision_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "projection_dim": config.width,
        "hidden_act": config.act,
        "layer_norm_eps": config.eps,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "vocab_size": 32000,
    }


def open_directory(directory: epath.Path) -> tuple[dict[str, Any], TensorFiles, str]:
    """(config.json, tensors, prefix of the tower's names) of a CLIP directory.

    Raises:
      UnusableCheckpoint: no CLIP tower is in it.
    """
    content = read_json(directory / "config.json")
    unread.refuse_quantised(content, str(directory))
    tensors = open_tensors(directory)
    # transformers 5.6 and later write a lone vision model without "vision_model.".
    found = [prefix for prefix in ("vision_model.", "") if prefix + "embeddings.class_embedding" in tensors.specs]
    if not found:
        shown = ", ".join(list(tensors.specs)[:3])
        raise UnusableCheckpoint(f"{directory}: no CLIP vision tower here; its tensors are such as {shown}")
    return content, tensors, found[0]
