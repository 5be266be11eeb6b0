"""What the released models are: sizes as frozen dataclasses, and the presets by name with their sources."""

import difflib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from llava_jax.errors import UsageError
from llava_jax.models.json_config import branch, build

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# What a number in a config may be, both ends included, where no other field limits it; (1, SIZE) for all others. An
# eps of 0 gives NaN where a row is constant.
SIZE = 2**24
_RANGES = {
    "layers": (1, 1000), "added_tokens": (0, SIZE), "select_layer": (-1001, 1000), "eps": (1e-20, 0.1),
    "ln_vision_eps": (1e-20, 0.1), "rope_theta": (1, 1e12), "factor": (1e-3, 1e6), "mean": (-1e4, 1e4),
    "std": (1e-6, 1e4),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What all configs of models share: their numbers are such as a model can have."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = _RANGES.get(field.name, (1, SIZE))
            numbers = value if isinstance(value, tuple) else (value,)
            in_range = all(low <= x <= high for x in numbers if isinstance(x, int | float) and not isinstance(x, bool))
            _check(in_range, field.name, value, f"between {low:g} and {high:g}")


@dataclass(frozen=True)
class TowerConfig(Sizes):
    """What the sizes of all vision transformers here say; each kind adds its own and says where its blocks end.

    select_feature: "patch" drops the class token, "cls_patch" keeps it.
    """

    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    eps: float = 1e-5
    select_feature: str = "patch"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.image_size % self.patch_size == 0, "image_size", self.image_size,
               f"a multiple of patch_size={self.patch_size}, above 0")  # fmt: skip
        _check(self.width % self.heads == 0, "width", self.width, f"a multiple of heads={self.heads}")
        _check(self.select_feature in ("patch", "cls_patch"), "select_feature", self.select_feature,
               "patch or cls_patch")  # fmt: skip

    @property
    def patches(self) -> int:
        """Patches of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def features(self) -> int:
        """Features that one image gives to the connector."""
        return self.patches + (self.select_feature == "cls_patch")

    @property
    def run_layers(self) -> int:
        """Blocks that run."""
        return self.layers


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """A CLIP vision transformer. Source: openai/CLIP; names as in transformers' CLIPVisionConfig.

    select_layer: index into the hidden states (0 is the output of `pre_ln`, k that of block k, negative from
      the end); blocks after it never run. LLaVA takes -2, without `post_ln`.
    """

    act: str = "quick_gelu"
    select_layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.act in ("quick_gelu", "gelu"), "act", self.act, "quick_gelu or gelu")
        _check(-self.layers - 1 <= self.select_layer <= self.layers, "select_layer", self.select_layer,
               f"between {-self.layers - 1} and {self.layers}")  # fmt: skip

    @property
    def run_layers(self) -> int:
        """Blocks that run to reach `select_layer`; the others are kept in `vision/tail`."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


@dataclass(frozen=True)
class EvaConfig(TowerConfig):
    """EVA-CLIP's vision transformer as BLIP-2 uses it: all `layers` run, without a norm before or after them.

    layers: 39 of the 40 that EVA released, since BLIP-2 reads the second-last hidden state.
    select_feature: BLIP-2's Q-Former also reads the class token.
    Source: LAVIS lavis/models/eva_vit.py@506965b.
    """

    eps: float = 1e-6
    select_feature: str = "cls_patch"


@dataclass(frozen=True)
class QFormerConfig(Sizes):
    """BLIP-2's Q-Former, the branch of its queries; defaults are those of BERT-base, as released.

    cross_every: layers 0, cross_every, 2 cross_every ... also look at the image.
    Source: LAVIS lavis/models/blip2_models/Qformer.py@506965b.
    """

    queries: int = 32
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    cross_every: int = 2
    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.width % self.heads == 0, "resampler.width", self.width, f"a multiple of heads={self.heads}")
        _check(self.layers % self.cross_every == 0, "resampler.layers", self.layers,
               f"a multiple of cross_every={self.cross_every}")  # fmt: skip

    @property
    def outputs(self) -> int:
        """Features that it makes of one image."""
        return self.queries


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


@dataclass(frozen=True)
class RopeScaling(Sizes):
    """Stretched rotary positions: "linear" divides them, "dynamic" raises the base beyond `max_positions`."""

    kind: str
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.kind in ("linear", "dynamic"), "rope_scaling.kind", self.kind, "linear or dynamic")


@dataclass(frozen=True)
class LlamaConfig(Sizes):
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
        super().__post_init__()
        _check(self.heads % self.kv_heads == 0, "heads", self.heads, f"a multiple of kv_heads={self.kv_heads}")
        _check(self.head_width % 2 == 0, "head_width", self.head_width, "an even number (rotary halves)")

    @property
    def rows(self) -> int:
        """Rows of the vocabulary, added ones included."""
        return self.vocab + self.added_tokens

    @property
    def positions(self) -> int:
        """Positions that it can tell apart: those of its training, times the factor of a stretched rope."""
        return int(self.max_positions * (self.rope_scaling.factor if self.rope_scaling else 1))


# A connector -> the kind of its resampler; those that are not here have none.
RESAMPLERS = {"qformer": QFormerConfig, "perceiver": PerceiverConfig, "flamingo_xattn": PerceiverConfig}
CONCATENATED = 4  # features that "concat4_linear" makes one of


@dataclass(frozen=True)
class LlavaConfig(Sizes):
    """Tower, connector and decoder.

    projector: the connector's name: "linear", "mlp{n}x_gelu", "identity"; "qformer", "perceiver" and
      "concat4_linear", each with a linear layer after it; or "flamingo_xattn", a perceiver whose features no token
      stands for: blocks in the decoder look at them.
    ln_vision_eps: of a norm between tower and connector, as BLIP-2 has it; None: there is none.
    resampler: sizes of the connector's Q-Former or perceiver. cross: of the decoder's blocks for "flamingo_xattn".
    """

    vision: TowerConfig
    projector: str
    llm: LlamaConfig
    image_newline: bool = False
    ln_vision_eps: float | None = None
    resampler: QFormerConfig | PerceiverConfig | None = None
    cross: CrossConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = RESAMPLERS.get(self.projector, type(None))
        _check(isinstance(self.resampler, wanted), "resampler", self.resampler,
               f"{wanted.__name__} for the projector {self.projector!r}")  # fmt: skip
        flamingo = self.projector == "flamingo_xattn"
        _check((self.cross is not None) == flamingo, "cross", self.cross, 'one for "flamingo_xattn" and no other')
        if self.cross is not None:
            _check(self.cross.media_width == self.vision.width, "cross.media_width", self.cross.media_width,
                   f"the tower's width={self.vision.width}")  # fmt: skip
            _check(1 <= self.cross.every <= self.llm.layers, "cross.every", self.cross.every,
                   f"between 1 and the decoder's layers={self.llm.layers}")  # fmt: skip
            _check(not self.image_newline, "image_newline", self.image_newline, "False: no token stands for features")
        if self.projector == "concat4_linear":
            _check(self.vision.features % CONCATENATED == 0, "vision.features", self.vision.features,
                   f'a multiple of {CONCATENATED}, with select_feature="patch"')  # fmt: skip

    @property
    def image_features(self) -> int:
        """N: positions of a row that one image takes, and rows of features that stand for it.

        1 for "flamingo_xattn": the position of the image's mark, an ordinary token.
        """
        if self.projector == "flamingo_xattn":
            return 1
        if self.resampler is not None:
            return self.resampler.outputs
        return self.vision.features // (CONCATENATED if self.projector == "concat4_linear" else 1)


def _check(fine: bool, name: str, value: object, wish: str) -> None:
    if not fine:
        raise UsageError(f"model config {name}={value!r}: want {wish}")


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

# Source: LAVIS create_eva_vit_g (width 1408, 16 heads of 88, mlp int(1408 * 4.3637)).
EVA_G14_224 = EvaConfig(image_size=224, patch_size=14, width=1408, mlp_width=6144, layers=39, heads=16)
_MINIGPT4 = LlavaConfig(EVA_G14_224, "qformer", LLAMA1_7B, ln_vision_eps=1e-5, resampler=QFormerConfig())
_EVA_PATCHES = replace(EVA_G14_224, select_feature="patch")

PRESETS: dict[str, LlavaConfig] = {
    # Liu et al. 2023, Visual Instruction Tuning: CLIP ViT-L/14, a linear projection, Vicuna.
    "llava10_7b": LlavaConfig(CLIP_L14_224, "linear", LLAMA1_7B),
    "llava10_13b": LlavaConfig(CLIP_L14_224, "linear", LLAMA1_13B),
    # Liu et al. 2024, Improved Baselines: 336 pixels, a two-layer MLP, Vicuna v1.5.
    "llava15_7b": LlavaConfig(CLIP_L14_336, "mlp2x_gelu", LLAMA2_7B),
    "llava15_13b": LlavaConfig(CLIP_L14_336, "mlp2x_gelu", LLAMA2_13B),
    # Zhu et al. 2023, MiniGPT-4: EVA-CLIP ViT-g/14, BLIP-2's Q-Former, a linear layer, Vicuna v0.
    "minigpt4_7b": _MINIGPT4,
    "minigpt4_13b": replace(_MINIGPT4, llm=LLAMA1_13B),
    # Without a Q-Former: MiniGPT-4 on Llama-2-7B-chat, and MiniGPT-v2 at 448 pixels.
    # Source: MiniGPT-4 minigpt4/models/{minigpt4,minigpt_v2}.py@d94738a.
    "minigpt4_llama2_7b": LlavaConfig(_EVA_PATCHES, "concat4_linear", LLAMA2_7B, ln_vision_eps=1e-5),
    "minigptv2_7b": LlavaConfig(replace(_EVA_PATCHES, image_size=448), "concat4_linear", LLAMA2_7B,
                                ln_vision_eps=1e-5),
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
        raise UsageError(f"unknown model preset {name!r}: there are {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def config_to_json(config: LlavaConfig) -> dict[str, Any]:
    """Every field, nested, JSON-able: the `model` part of a checkpoint's model.json.

    What only connectors have is left out where there is none, so a LLaVA's card is what it has always been.
    """
    data = asdict(config)
    if isinstance(config.vision, EvaConfig):
        data["vision"] |= {"kind": "eva"}
    return {name: value for name, value in data.items() if name not in _OPTIONAL or value is not None}


_OPTIONAL = ("ln_vision_eps", "resampler", "cross")
_TOWERS = {"clip": VisionConfig, "eva": EvaConfig}  # vision.kind; cards of CLIP towers do not have it


def config_from_json(data: dict[str, Any]) -> LlavaConfig:
    """The inverse of `config_to_json`. A key that an older version did not write has its default.

    Raises:
      UsageError: a missing or an unknown key, or a value that no such model can have.
    """
    data = dict(data)
    vision = branch(data.pop("vision", None), "model.vision")
    llm = branch(data.pop("llm", None), "model.llm")
    for name in ("mean", "std"):
        if isinstance(vision.get(name), list):
            vision[name] = tuple(vision[name])
    if llm.get("rope_scaling") is not None:
        llm["rope_scaling"] = build(RopeScaling, llm["rope_scaling"], "model.llm.rope_scaling")
    kind = vision.pop("kind", "clip")
    _check(isinstance(kind, str) and kind in _TOWERS, "vision.kind", kind, f"one of {', '.join(_TOWERS)}")
    parts = {"vision": build(_TOWERS[kind], vision, "model.vision"), "llm": build(LlamaConfig, llm, "model.llm")}
    kinds = {"resampler": RESAMPLERS.get(str(data.get("projector"))), "cross": CrossConfig}
    for name, part in kinds.items():
        if part is not None and data.get(name) is not None:
            parts[name] = build(part, data[name], f"model.{name}")
    return build(LlavaConfig, data | parts, "model")
