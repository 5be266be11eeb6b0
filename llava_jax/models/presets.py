"""What the released models are: sizes as frozen dataclasses, and the presets by name with their sources."""

import difflib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer. Source: openai/CLIP; names as in transformers' CLIPVisionConfig.

    select_layer: index into the hidden states (0 is the output of `pre_ln`, k that of block k, negative from
      the end); blocks after it never run. LLaVA takes -2, without `post_ln`.
    select_feature: "patch" drops the class token, "cls_patch" keeps it.
    """

    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    act: str = "quick_gelu"
    eps: float = 1e-5
    select_layer: int = -2
    select_feature: str = "patch"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        _check(self.image_size % self.patch_size == 0, "image_size", self.image_size,
               f"a multiple of patch_size={self.patch_size}")  # fmt: skip
        _check(self.width % self.heads == 0, "width", self.width, f"a multiple of heads={self.heads}")
        _check(self.act in ("quick_gelu", "gelu"), "act", self.act, "quick_gelu or gelu")
        _check(self.select_feature in ("patch", "cls_patch"), "select_feature", self.select_feature,
               "patch or cls_patch")  # fmt: skip
        _check(-self.layers - 1 <= self.select_layer <= self.layers, "select_layer", self.select_layer,
               f"between {-self.layers - 1} and {self.layers}")  # fmt: skip

    @property
    def patches(self) -> int:
        """Patches of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def features(self) -> int:
        """Features that one image gives to the projector."""
        return self.patches + (self.select_feature == "cls_patch")

    @property
    def run_layers(self) -> int:
        """Blocks that run to reach `select_layer`; the others are kept in `vision/tail`."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary positions: "linear" divides them, "dynamic" raises the base beyond `max_positions`."""

    kind: str
    factor: float

    def __post_init__(self) -> None:
        _check(self.kind in ("linear", "dynamic"), "rope_scaling.kind", self.kind, "linear or dynamic")


@dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA decoder; names follow transformers' LlamaConfig where it has one.

    added_tokens: rows added to the vocabulary (`<im_start>` ...); leaves of their own, so they can move alone.
    """

    vocab: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 4096
    added_tokens: int = 0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        _check(self.heads % self.kv_heads == 0, "heads", self.heads, f"a multiple of kv_heads={self.kv_heads}")
        _check(self.head_width % 2 == 0, "head_width", self.head_width, "an even number (rotary halves)")


@dataclass(frozen=True)
class LlavaConfig:
    """Tower, projector ("linear", "mlp{n}x_gelu", "identity") and decoder."""

    vision: VisionConfig
    projector: str
    llm: LlamaConfig
    image_newline: bool = False


def _check(fine: bool, name: str, value: object, wish: str) -> None:
    if not fine:
        raise ValueError(f"model config {name}={value!r}: want {wish}")


CLIP_L14_224 = VisionConfig(image_size=224, patch_size=14, width=1024, mlp_width=4096, layers=24, heads=16)
CLIP_L14_336 = replace(CLIP_L14_224, image_size=336)
# Source: the config.json of the released checkpoints; LLaMA-1 (Vicuna v0 to v1.3) has eps 1e-6 and 2,048 positions,
# Llama-2 (Vicuna v1.5) eps 1e-5 and 4,096.
LLAMA2_7B = LlamaConfig(
    vocab=32000, width=4096, mlp_width=11008, layers=32, heads=32, kv_heads=32, head_width=128
)  # fmt: skip
LLAMA2_13B = replace(LLAMA2_7B, width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40)
LLAMA1_7B = replace(LLAMA2_7B, eps=1e-6, max_positions=2048)
LLAMA1_13B = replace(LLAMA2_13B, eps=1e-6, max_positions=2048)

PRESETS: dict[str, LlavaConfig] = {
    # Liu et al. 2023, Visual Instruction Tuning: CLIP ViT-L/14, a linear projection, Vicuna.
    "llava10_7b": LlavaConfig(CLIP_L14_224, "linear", LLAMA1_7B),
    "llava10_13b": LlavaConfig(CLIP_L14_224, "linear", LLAMA1_13B),
    # Liu et al. 2024, Improved Baselines: 336 pixels, a two-layer MLP, Vicuna v1.5.
    "llava15_7b": LlavaConfig(CLIP_L14_336, "mlp2x_gelu", LLAMA2_7B),
    "llava15_13b": LlavaConfig(CLIP_L14_336, "mlp2x_gelu", LLAMA2_13B),
    # Small enough for a unit test: 4 features an image, grouped query heads, the 960-piece test tokenizer.
    "tiny": LlavaConfig(
        VisionConfig(image_size=28, patch_size=14, width=32, mlp_width=64, layers=3, heads=2), "mlp2x_gelu",
        LlamaConfig(vocab=960, width=48, mlp_width=96, layers=3, heads=4, kv_heads=2, head_width=12,
                    max_positions=1024),
    ),
}  # fmt: skip


def get(name: str) -> LlavaConfig:
    """The preset of that name.

    Raises:
      ValueError: no such preset; the message lists what there is.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model preset {name!r}: there are {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def config_to_json(config: LlavaConfig) -> dict[str, Any]:
    """Every field, nested, JSON-able: the `model` part of a checkpoint's model.json."""
    return asdict(config)


def config_from_json(data: dict[str, Any]) -> LlavaConfig:
    """The inverse of `config_to_json`.

    Raises:
      ValueError: a missing or an unknown key, or a value that no such model can have.
    """
    data = dict(data)
    vision, llm = dict(data.pop("vision", {})), dict(data.pop("llm", {}))
    for name in ("mean", "std"):
        if name in vision:
            vision[name] = tuple(vision[name])
    if llm.get("rope_scaling") is not None:
        llm["rope_scaling"] = _build(RopeScaling, llm["rope_scaling"], "model.llm.rope_scaling")
    parts = {"vision": _build(VisionConfig, vision, "model.vision"), "llm": _build(LlamaConfig, llm, "model.llm")}
    return _build(LlavaConfig, data | parts, "model")


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    known = [field.name for field in fields(kind)]
    wrong = sorted(set(values) ^ set(known))
    if wrong:
        raise ValueError(f"{where} in model.json: keys {wrong} are missing or unknown; want exactly {known}")
    return kind(**values)
