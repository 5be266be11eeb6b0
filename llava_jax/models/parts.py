"""What a part of a model is: the base of every config, and what a tower, a connector and a decoder say of themselves.

A part is one file that ends in one of these records; `models.registry` lists the files. Nothing else in the package
asks what kind of a part it has before it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import flax.linen as nn

from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models.names import Row

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# What a number in a config may be, both ends included, where no other field limits it; (1, SIZE) for all others. An
# eps of 0 gives NaN where a row is constant.
SIZE = 2**24
_RANGES = {
    "layers": (1, 1000), "added_tokens": (0, SIZE), "select_layer": (-1001, 1000), "eps": (1e-20, 0.1),
    "ln_vision_eps": (1e-20, 0.1), "rope_theta": (1, 1e12), "factor": (1e-3, 1e6), "mean": (-1e4, 1e4),
    "std": (1e-6, 1e4), "low_freq_factor": (1e-3, 1e6), "high_freq_factor": (1e-3, 1e6),
}  # fmt: skip


def check(fine: bool, name: str, value: object, wish: str) -> None:
    """Raises UsageError that names a field of a model's config, unless `fine`."""
    if not fine:
        raise UsageError(f"model config {name}={value!r}: want {wish}")


@dataclass(frozen=True)
class Sizes:
    """What all configs of models share: their numbers are such as a model can have."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            low, high = _RANGES.get(one.name, (1, SIZE))
            numbers = value if isinstance(value, tuple) else (value,)
            in_range = all(low <= x <= high for x in numbers if isinstance(x, int | float) and not isinstance(x, bool))
            check(in_range, one.name, value, f"between {low:g} and {high:g}")


@dataclass(frozen=True)
class TowerConfig(Sizes):
    """What the sizes of all vision transformers here say; each kind adds its own and says where its blocks end.

    select_feature: "patch" drops the class token, "cls_patch" keeps it; a tower without one has "patch".
    resample: how a picture is made `image_size` pixels a side, "bicubic" or "bilinear".
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
    resample: str = "bicubic"
    select_layer: ClassVar[int] = -1  # the hidden state that its features are; of some kinds a field
    cut_edge: ClassVar[bool] = False  # pixels that fill no patch, at the right and the lower edge, are not seen

    def __post_init__(self) -> None:
        super().__post_init__()
        rest, wish = self.image_size % self.patch_size, "at least" if self.cut_edge else "a multiple of"
        fits = self.image_size >= self.patch_size and (self.cut_edge or rest == 0)
        check(fits, "image_size", self.image_size, f"{wish} patch_size={self.patch_size}, above 0")
        check(self.width % self.heads == 0, "width", self.width, f"a multiple of heads={self.heads}")
        check(self.select_feature in ("patch", "cls_patch"), "select_feature", self.select_feature,
              "patch or cls_patch")  # fmt: skip
        check(self.resample in ("bicubic", "bilinear"), "resample", self.resample, "bicubic or bilinear")

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
class RopeScaling(Sizes):
    """Stretched rotary positions.

    kind: "linear" divides them, "dynamic" raises the base beyond `max_positions`, "llama3" divides the slow rotations
      only. Source: transformers modeling_rope_utils.py.
    low_freq_factor, high_freq_factor, original_positions: of "llama3" alone.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.kind in ("linear", "dynamic", "llama3"), "rope_scaling.kind", self.kind, "linear, dynamic or llama3")
        own = (self.low_freq_factor, self.high_freq_factor, self.original_positions)
        whole = all(x is not None for x in own) if self.kind == "llama3" else not any(own)
        check(whole, "rope_scaling", own, "low_freq_factor, high_freq_factor and original_positions, of llama3 alone")
        if self.kind == "llama3":
            check(own[0] < own[1], "rope_scaling.low_freq_factor", own[0], f"less than high_freq_factor={own[1]}")


@dataclass(frozen=True)
class DecoderConfig(Sizes):
    """What the sizes of all decoders here say; names follow transformers' LlamaConfig where it has one.

    added_tokens: rows added to the vocabulary (`<im_start>` ...); parameters of their own, so they can be trained
      alone.
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
        check(self.heads % self.kv_heads == 0, "heads", self.heads, f"a multiple of kv_heads={self.kv_heads}")
        check(self.head_width % 2 == 0, "head_width", self.head_width, "an even number (rotary halves)")

    @property
    def usable_positions(self) -> int:
        """Positions that it can tell apart: those of its training, times the factor of a rope stretched afterwards."""
        stretched = self.rope_scaling is not None and self.rope_scaling.kind != "llama3"
        return int(self.max_positions * (self.rope_scaling.factor if stretched else 1))


Content = Mapping[str, Any]  # a config.json, or one object inside it
NUMBERS = (int, float)  # types of its numbers; `true` is none


@dataclass(frozen=True)
class GgufDecoder:
    """How llama.cpp has a decoder.

    architecture: `general.architecture`. rows: the table of its tensors' names.
    paired: the rotary halves of queries and keys stand in pairs (0, H/2, 1, H/2 + 1, ...), not one behind the other.
    scalings: kinds of `RopeScaling` that it knows.
    """

    architecture: str
    rows: Sequence[Row]
    paired: bool = False
    scalings: tuple[str, ...] = ("linear",)


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    kind: its name in model.json (`vision.kind`). label: what a message calls it.
    module: made with (config, dtype, lora_dropout, remat); uint8 pictures [Img, Side, Side, 3] -> features [Img, P, C].
    model_types: what `model_type` of transformers' config of such a tower, or of a whole model around it, may say.
    mark: the end of a tensor's name that only such a tower has.
    class_token: a class token stands before its patches.
    rows: (beginning of its tensors' names) -> their table.
    read_config: (config.json of the tower, the file's name, select_layer, select_feature) -> the config.
    config_json: the `vision_config` that transformers reads.
    first_layers: {beginning of our name: number of a stack's first layer in their names}, 0 where none fits.
    hub: {name that the original code fetches a tower by: its config}.
    kept: the form in which the original code keeps a fetched tower among its own tensors.
    ignored: patterns over names of theirs that are no part of the model.
    hub_class, processor: the classes of transformers for the tower alone and for its pictures.
    gguf: the table of what runs of it in llama.cpp's file of a tower and connector; its config is a `vit.VisionConfig`.
      None: that has no such tower.
    """

    kind: str
    label: str
    config: type[TowerConfig]
    module: Callable[..., nn.Module]
    model_types: tuple[str, ...]
    mark: str
    rows: Callable[[str], list[Row]]
    read_config: Callable[[Content, str, int, str], TowerConfig]
    config_json: Callable[[Any], dict[str, Any]]
    class_token: bool = True
    first_layers: Callable[[Any], dict[str, int]] = lambda config: {}
    hub: Mapping[str, TowerConfig] = field(default_factory=dict)
    kept: Callable[[Any], TowerConfig] = lambda config: config
    ignored: tuple[str, ...] = ()
    hub_class: str = "CLIPVisionModel"
    processor: str = "CLIPImageProcessor"
    gguf: Sequence[Row] | None = None


@dataclass(frozen=True)
class Decoder:
    """A kind of language model.

    kind: its name in model.json (`llm.kind`), and `model_type` of transformers' config. label: what a message calls it.
    module: made with (config, dtype, remat, lora_dropout, cross, media_rows), as `models.llama.Llama`.
    rows: (beginning of its tensors' names, name of the output matrix) -> their table.
    read_config: (config.json or `text_config`, the file's name) -> the config.
    config_json: (config, rows of the vocabulary, dtype) -> the `text_config` that transformers reads.
    hub_class: the class of transformers. original: (class, model_type) of the original code's model with it.
    template: of conversations, where nobody says another.
    ignored: patterns over names of theirs that are no part of the model.
    gguf: None where llama.cpp has no such decoder.
    """

    kind: str
    label: str
    config: type[DecoderConfig]
    module: Callable[..., nn.Module]
    rows: Callable[[str, str], list[Row]]
    read_config: Callable[[Content, str], DecoderConfig]
    config_json: Callable[[Any, int, str], dict[str, Any]]
    hub_class: str
    original: tuple[str, str]
    template: str
    ignored: tuple[str, ...] = (r".*\brotary_emb\.inv_freq",)
    gguf: GgufDecoder | None = None


@dataclass(frozen=True)
class Connector:
    """A kind of connector between tower and decoder. Its modules take features [Img, P, C].

    name: a pattern over `LlavaConfig.projector`. shown: how a message writes that.
    module: made with (projector, the decoder's width, dtype, lora_dropout); gives [Img, N, D].
    features: (config of the model) -> N, rows of features that stand for one image.
    rows: (projector, beginning of its tensors' names, such as `mm_projector.`) -> the table of `projector/`.
    resampler, resampler_module: config and module, made with (config, dtype, lora_dropout), of what runs before it and
      has parameters of its own; None: there is none.
    check: (config of the model) raises UsageError where the tower or the decoder does not fit.
    gated: its features enter no sequence; blocks in the decoder look at them.
    gguf: {connector's name: the table of `projector/` in llama.cpp's file} of those that it computes as they are here.
    """

    name: str
    shown: str
    module: Callable[..., nn.Module]
    features: Callable[[Any], int]
    rows: Callable[[str, str], list[Row]]
    resampler: type[Sizes] | None = None
    resampler_module: Callable[..., nn.Module] | None = None
    check: Callable[[Any], None] = lambda config: None
    gated: bool = False
    gguf: Mapping[str, Sequence[Row]] = field(default_factory=dict)


def check_fixed(values: Content, wanted: Mapping[str, Any], where: str, model: str) -> None:
    """Raises UnusableCheckpoint unless a config.json says what `models` has no other form of."""
    for key, value in wanted.items():
        if values[key] != value:
            raise UnusableCheckpoint(f"{where}: {key} is {values[key]!r}; wanted {value!r}, {model} as released")


def check_numbers(values: Content, sizes: Sequence[str], eps: str, where: str) -> None:
    """Raises UnusableCheckpoint unless a config's sizes are whole numbers above 0, and its eps a number above 0."""
    for key in (*sizes, eps):
        value, kinds = values[key], NUMBERS if key == eps else (int,)
        if type(value) not in kinds or not value > 0:
            kind = "number" if key == eps else "whole number"
            raise UnusableCheckpoint(f"{where}: {key} is {value!r}; wanted a {kind} above 0")


def check_choice(values: Content, key: str, known: Collection[Any], where: str) -> None:
    """Raises UnusableCheckpoint unless a config.json has one of the values that are known here."""
    value = values[key]
    if not any(type(value) is type(one) and value == one for one in known):
        raise UnusableCheckpoint(f"{where}: {key} is {value!r}; wanted one of {', '.join(map(str, known))}")

