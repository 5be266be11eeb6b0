"""EVA ViT-g of LAVIS and of Hugging Face's BLIP-2: names of their tensors, their sizes, both ways.

Hugging Face keeps one bias for queries, keys and values; here it is read as two and written as one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from llava_jax.convert.clip import SIZES
from llava_jax.convert.files import Spec, TensorFiles, check_numbers
from llava_jax.convert.table import CELL, LINEAR, PATCH, ROW, SAME, Row
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.presets import EvaConfig

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
    "cls_token", "pos_embed", "patch_embed.proj.", "blocks.{layer}.", r"norm\1.", "attn.qkv.weight", r"attn.\1_bias",
    "attn.proj.",
)  # fmt: skip
HUB = Names(
    "embeddings.class_embedding", "embeddings.position_embedding", "embeddings.patch_embedding.",
    "encoder.layers.{layer}.", r"layer_norm\1.", "self_attn.qkv.weight", r"self_attn.qkv.\1_bias",
    "self_attn.projection.",
)  # fmt: skip
_WHOLE, _FIRST, _LAST = ".self_attn.qkv.bias", ".self_attn.qkv.q_bias", ".self_attn.qkv.v_bias"


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
    for ours, theirs, axes in (("kernel", "weight", LINEAR), ("bias", "bias", SAME)):
        table += [
            (f"vision/blocks/o/{ours}", (layer + names.output + theirs, axes)),
            (f"vision/blocks/(fc[12])/{ours}", (layer + rf"mlp.\1.{theirs}", axes)),
        ]
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        table.append((f"vision/blocks/ln([12])/{ours}", (layer + names.norm + theirs, SAME)))
    return table


def read_hub_config(content: Mapping[str, Any], where: str, select_feature: str) -> EvaConfig:
    """A tower's config from transformers' `vision_config`.

    Raises:
      UnusableCheckpoint: not a tower as `models` has it.
    """
    values = {**_DEFAULTS, **content}
    for key, wanted in _FIXED.items():
        if values[key] != wanted:
            raise UnusableCheckpoint(f"{where}: {key} is {values[key]!r}; wanted {wanted!r}, BLIP-2 as released")
    check_numbers(values, SIZES, "layer_norm_eps", where)
    return EvaConfig(
        image_size=values["image_size"], patch_size=values["patch_size"], width=values["hidden_size"],
        mlp_width=values["intermediate_size"], layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"], eps=values["layer_norm_eps"], select_feature=select_feature,
    )  # fmt: skip


def hub_config_json(config: EvaConfig) -> dict[str, Any]:
    """The `vision_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": "blip_2_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": config.eps,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "qkv_bias": True,
    }


def read_lavis_config(tensors: TensorFiles, select_feature: str) -> tuple[EvaConfig, str, tuple[str, ...]]:
    """(config, prefix, patterns of names that are not for it) of a file with LAVIS's names.

    The tower as EVA released it, without prefix, has one block more than runs; a LAVIS model's own has not.

    Raises:
      UnusableCheckpoint: no EVA ViT is in it, or not one as `models` has it.
    """
    specs = tensors.specs
    prefix = LAVIS_PREFIX if LAVIS_PREFIX + LAVIS.cls in specs else ""
    found = map(re.compile(re.escape(prefix) + r"blocks\.(\d+)\..*").fullmatch, specs)
    blocks = {int(match[1]) for match in found if match}
    layers = len(blocks) if prefix else len(blocks) - 1
    try:
        width, _, patch_size, _ = specs[f"{prefix}{LAVIS.patch}weight"].shape
        _, positions, _ = specs[prefix + LAVIS.pos].shape
        mlp_width, _ = specs[f"{prefix}blocks.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError):
        shown = ", ".join(list(specs)[:3])
        raise UnusableCheckpoint(f"{tensors.path}: no EVA ViT here; its tensors are such as {shown}") from None
    side = round((positions - 1) ** 0.5)
    if side * side + 1 != positions or width % HEAD_WIDTH or layers < 1:
        raise UnusableCheckpoint(
            f"{tensors.path}: {positions} positions, width {width}, {layers} blocks to run; wanted a square and one "
            f"more, a multiple of {HEAD_WIDTH}, at least 1"
        )
    config = EvaConfig(
        image_size=side * patch_size, patch_size=patch_size, width=width, mlp_width=mlp_width, layers=layers,
        heads=width // HEAD_WIDTH, select_feature=select_feature,
    )  # fmt: skip
    return config, prefix, (rf"{prefix}blocks\.{layers}\..*", *LAVIS_IGNORED)


class _View(TensorFiles):
    """The tensors of others with some of them replaced.

    made: {new name: (name of theirs, its spec as it is made, how)}; what `hidden` names is not shown.
    """

    def __init__(
        self, tensors: TensorFiles, hidden: set[str], made: Mapping[str, tuple[str, Spec, Callable[..., np.ndarray]]]
    ):
        self.path, self._tensors, self._made = tensors.path, tensors, made
        self.specs = {name: spec for name, spec in tensors.specs.items() if name not in hidden}
        self.specs |= {name: spec for name, (_, spec, _) in made.items()}

    def read(self, name: str) -> np.ndarray:
        if name not in self._made:
            return self._tensors.read(name)
        theirs, _, make = self._made[name]
        return make(self._tensors.read(theirs))


def with_split_biases(tensors: TensorFiles) -> TensorFiles:
    """Hugging Face's tensors with each bias of queries, keys and values as two, without the keys'.

    LAVIS has no bias of keys and writes zeros here. Whatever it is, it shifts all scores of a query alike, which the
    softmax does not see.
    """
    whole, made = {name for name in tensors.specs if name.endswith(_WHOLE)}, {}
    for name in whole:
        (size,), dtype = tensors.specs[name]
        spec, start = Spec((size // 3,), dtype), name.removesuffix(_WHOLE)
        made[start + _FIRST] = (name, spec, lambda bias: bias[: len(bias) // 3])
        made[start + _LAST] = (name, spec, lambda bias: bias[2 * len(bias) // 3 :])
    return _View(tensors, whole, made)


def joined_specs(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Specs as `joined` gives them: the whole bias stands where that of the values stood."""
    found = {}
    for name, spec in specs.items():
        if name.endswith(_LAST):
            found[name.removesuffix(_LAST) + _WHOLE] = Spec((3 * spec.shape[0],), spec.dtype)
        elif not name.endswith(_FIRST):
            found[name] = spec
    return found


def joined(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors as they come, each pair of biases as one, with zeros for the keys."""
    waiting: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if name.endswith(_FIRST):
            waiting[name.removesuffix(_FIRST)] = np.array(tensor)
        elif name.endswith(_LAST):
            start = name.removesuffix(_LAST)
            yield start + _WHOLE, np.concatenate([waiting.pop(start), np.zeros_like(tensor), tensor])
        else:
            yield name, tensor
        del tensor  # it would live on while the next one is read
    assert not waiting, sorted(waiting)


def resized(tensors: TensorFiles, name: str, side: int) -> TensorFiles:
    """The tensors with the positions `name` interpolated to `side` x `side` patches."""
    spec = tensors.specs[name]
    shape = (1, side * side + 1, spec.shape[2])
    return _View(tensors, {name}, {name: (name, Spec(shape, spec.dtype), lambda array: interpolated(array, side))})


def interpolated(positions: np.ndarray, side: int) -> np.ndarray:
    """[1, 1 + n * n, C] -> [1, 1 + side * side, C], the class token's as it is, in float32 within.

    torch's bicubic (a = -0.75, align_corners=False, edges repeated), which jax.image.resize's (a = -0.5) is not.
    Source: LAVIS eva_vit.py interpolate_pos_embed.
    """
    size = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[0, 1:].astype(np.float32).reshape(size, size, -1)
    weights = _bicubic(size, side)
    grid = np.einsum("rp,pqc,sq->rsc", weights, grid, weights, optimize=True).reshape(side * side, -1)
    return np.concatenate([positions[:, :1], grid[None].astype(positions.dtype)], axis=1)


def _bicubic(size: int, side: int, a: float = -0.75) -> np.ndarray:
    """float32 [side, size]: the share of each old place in each new one. Source: Keys 1981."""
    weights = np.zeros((side, size))
    for new in range(side):
        at = (new + 0.5) * size / side - 0.5
        first = int(np.floor(at)) - 1
        for old in range(first, first + 4):
            x = abs(at - old)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * a * x - 4 * a
            weights[new, min(max(old, 0), size - 1)] += near if x <= 1 else far
    return weights.astype(np.float32)
