"""What the released models are: sizes as frozen dataclasses, and the presets by name with their sources."""

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any

from llava_jax.errors import UsageError
from llava_jax.models import clip, eva, llama, mistral, qwen, registry, siglip
from llava_jax.models.eva import EvaConfig
from llava_jax.models.flamingo import CrossConfig, PerceiverConfig
from llava_jax.models.json_config import branch, build
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.parts import DecoderConfig, RopeScaling, Sizes, TowerConfig, check
from llava_jax.models.qformer import QFormerConfig
from llava_jax.models.vit import VisionConfig

__all__ = [  # the configs of the parts that presets have
    "CrossConfig", "DecoderConfig", "EvaConfig", "LlamaConfig", "PerceiverConfig", "QFormerConfig", "RopeScaling",
    "TowerConfig", "VisionConfig",
]  # fmt: skip


@dataclass(frozen=True)
class LlavaConfig(Sizes):
    """Tower, connector and decoder.

    projector: the connector's name (`models.registry`): "linear", "mlp{n}x_gelu", "qformer" ...; of
      "flamingo_xattn" no token stands for the features: blocks in the decoder look at them.
    ln_vision_eps: of a norm between tower and connector, as BLIP-2 has it; None: there is none.
    resampler: sizes of the connector's Q-Former or perceiver. cross: of the decoder's blocks for "flamingo_xattn".
    """

    vision: TowerConfig
    projector: str
    llm: DecoderConfig
    image_newline: bool = False
    ln_vision_eps: float | None = None
    resampler: Sizes | None = None
    cross: CrossConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        part = registry.connector(self.projector)
        wanted = part.resampler or type(None)
        check(isinstance(self.resampler, wanted), "resampler", self.resampler,
              f"{wanted.__name__} for the projector {self.projector!r}")  # fmt: skip
        check(part.gated or self.cross is None, "cross", self.cross, f"None for the projector {self.projector!r}")
        part.check(self)

    @property
    def image_features(self) -> int:
        """N: positions of a row that one image takes, and rows of features that stand for it."""
        return registry.connector(self.projector).features(self)


_MINIGPT4 = LlavaConfig(eva.G14_224, "qformer", llama.LLAMA1_7B, ln_vision_eps=1e-5, resampler=QFormerConfig())
_EVA_PATCHES = replace(eva.G14_224, select_feature="patch")

PRESETS: dict[str, LlavaConfig] = {
    # Liu et al. 2023, Visual Instruction Tuning: CLIP ViT-L/14, a linear projection, Vicuna.
    "llava10_7b": LlavaConfig(clip.L14_224, "linear", llama.LLAMA1_7B),
    "llava10_13b": LlavaConfig(clip.L14_224, "linear", llama.LLAMA1_13B),
    # Liu et al. 2024, Improved Baselines: 336 pixels, a two-layer MLP, Vicuna v1.5.
    "llava15_7b": LlavaConfig(clip.L14_336, "mlp2x_gelu", llama.LLAMA2_7B),
    "llava15_13b": LlavaConfig(clip.L14_336, "mlp2x_gelu", llama.LLAMA2_13B),
    # Liu et al. 2024, LLaVA-NeXT: LLaVA-1.5's parts with tiles (prompt.image_mode="anyres"), the tower trained too.
    # Source: config.json of liuhaotian/llava-v1.6-{vicuna-7b,vicuna-13b,mistral-7b}.
    "llava16_7b": LlavaConfig(clip.L14_336, "mlp2x_gelu", llama.LLAMA2_7B, image_newline=True),
    "llava16_13b": LlavaConfig(clip.L14_336, "mlp2x_gelu", llama.LLAMA2_13B, image_newline=True),
    "llava16_mistral_7b": LlavaConfig(clip.L14_336, "mlp2x_gelu", mistral.MISTRAL_7B, image_newline=True),
    # Li et al. 2024, LLaVA-OneVision: SigLIP without its last block and its head, Qwen2.
    # Source: config.json of lmms-lab/llava-onevision-qwen2-{0.5b,7b}-ov.
    "llava_onevision_05b": LlavaConfig(siglip.SO400M_384_KEPT, "mlp2x_gelu", qwen.QWEN2_05B, image_newline=True),
    "llava_onevision_7b": LlavaConfig(siglip.SO400M_384_KEPT, "mlp2x_gelu", qwen.QWEN25_7B, image_newline=True),
    # Zhu et al. 2023, MiniGPT-4: EVA-CLIP ViT-g/14, BLIP-2's Q-Former, a linear layer, Vicuna v0.
    "minigpt4_7b": _MINIGPT4,
    "minigpt4_13b": replace(_MINIGPT4, llm=llama.LLAMA1_13B),
    # Without a Q-Former: MiniGPT-4 on Llama-2-7B-chat, and MiniGPT-v2 at 448 pixels.
    # Source: MiniGPT-4 minigpt4/models/{minigpt4,minigpt_v2}.py@d94738a.
    "minigpt4_llama2_7b": LlavaConfig(_EVA_PATCHES, "concat4_linear", llama.LLAMA2_7B, ln_vision_eps=1e-5),
    "minigptv2_7b": LlavaConfig(replace(_EVA_PATCHES, image_size=448), "concat4_linear", llama.LLAMA2_7B,
                                ln_vision_eps=1e-5),
    # LLaVA's recipe on newer parts: SigLIP at 384 pixels with LLaMA 3.1, Qwen2.5 and Qwen3.
    "llava_llama3_8b_siglip": LlavaConfig(siglip.SO400M_384, "mlp2x_gelu", llama.LLAMA31_8B),
    "llava_qwen25_7b_siglip": LlavaConfig(siglip.SO400M_384, "mlp2x_gelu", qwen.QWEN25_7B),
    "llava_qwen3_8b_siglip": LlavaConfig(siglip.SO400M_384, "mlp2x_gelu", qwen.QWEN3_8B),
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

    What a LLaVA of the first kinds does not have is left out, so its model.json is what it has always been.
    """
    data = asdict(config)
    tower, decoder = registry.tower_of(config.vision).kind, registry.decoder_of(config.llm).kind
    data["vision"] |= {} if tower == "clip" else {"kind": tower}
    data["llm"] |= {} if decoder == "llama" else {"kind": decoder}
    if data["vision"]["resample"] == "bicubic":
        del data["vision"]["resample"]
    if data["llm"]["rope_scaling"] is not None:
        data["llm"]["rope_scaling"] = {k: v for k, v in data["llm"]["rope_scaling"].items() if v is not None}
    return {name: value for name, value in data.items() if name not in _OPTIONAL or value is not None}


_OPTIONAL = ("ln_vision_eps", "resampler", "cross")


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
    tower, decoder = registry.tower(vision.pop("kind", "clip")), registry.decoder(llm.pop("kind", "llama"))
    parts = {"vision": build(tower.config, vision, "model.vision"), "llm": build(decoder.config, llm, "model.llm")}
    kinds = {"cross": CrossConfig}
    if isinstance(data.get("projector"), str):
        kinds["resampler"] = registry.connector(data["projector"]).resampler
    for name, part in kinds.items():
        if part is not None and data.get(name) is not None:
            parts[name] = build(part, data[name], f"model.{name}")
    return build(LlavaConfig, data | parts, "model")
