"""Model FLOPs as they were recorded of formulas that described every architecture a second time (models/flops.py at
518e03a): for each token, pair, supervised position and image."""

from dataclasses import replace

from llava_jax.config import Lora
from llava_jax.models import clip, llama, presets
from llava_jax.models.presets import CrossConfig, LlavaConfig, PerceiverConfig

# What is trainable: nothing, stage 1's projector, stage 2's projector and decoder, everything.
STAGES = ("", "projector/.*", "(projector|llm)/.*", ".*")
_7B = ((12952010752, 524288, 262144000), (25904021504, 1572864, 524288000), (38856032256, 1572864, 786432000),
       (38856032256, 1572864, 786432000))  # fmt: skip
_13B = ((25375539200, 819200, 327680000), (50751078400, 2457600, 655360000), (76126617600, 2457600, 983040000),
        (76126617600, 2457600, 983040000))  # fmt: skip
_TINY = ((124416, 576, 92160), (248832, 1728, 184320), (373248, 1728, 276480), (373248, 1728, 276480))
_PRESETS = {
    "llava10_7b": (_7B, 157433294848, 159580778496, 159580778496, 471991603200),
    "llava10_13b": (_13B, 157970165760, 160654520320, 160654520320, 473602215936),
    "llava15_7b": (_7B, 390193049600, 433679593472, 433679593472, 1169885515776),
    "llava15_13b": (_13B, 402272645120, 468710420480, 468710420480, 1206124302336),
    "minigpt4_7b": (_7B, 533668452864, 533869779456, 533869779456, 1600581471744),
    "minigpt4_13b": (_13B, 533718784512, 533970442752, 533970442752, 1600732466688),
    "minigpt4_llama2_7b": (_7B, 523672050176, 526624840192, 526624840192, 1570592263680),
    "minigptv2_7b": (_7B, 2261521619456, 2273332779520, 2273332779520, 6782869310976),
    "tiny": (_TINY, 351488, 400640, 400640, 903936),
}
PRESETS = {(preset, stage): (*decoder, images) for preset, (decoders, *of_images) in _PRESETS.items()
           for stage, decoder, images in zip(STAGES, decoders, of_images)}  # fmt: skip

# Decoders of presets that came later, as the formulas count a LLaMA of their sizes, forward.
NEWER = {
    "llava_llama3_8b_siglip": (13958643712, 524288, 1050673152),
    "llava_qwen25_7b_siglip": (13050576896, 401408, 1089994752),
    "llava_qwen3_8b_siglip": (13891534848, 589824, 1244659712),
    "llava_onevision_05b": (715653120, 86016, 272269312),
    "llava_onevision_7b": (13050576896, 401408, 1089994752),
}
SAME = {"llava16_7b": "llava15_7b", "llava16_13b": "llava15_13b"}  # tiles are more of the same pictures

_STAGE_1, _STAGE_2 = STAGES[1:3]
CONFIGS = {
    "llava10_13b_pretrain": PRESETS["llava10_13b", _STAGE_1], "llava10_13b_finetune": PRESETS["llava10_13b", _STAGE_2],
    "llava10_13b_sqa": PRESETS["llava10_13b", _STAGE_2],
    **{f"llava15_{size}_{name}{packed}": PRESETS[f"llava15_{size}", stage] for size in ("7b", "13b")
       for name, stage in (("pretrain", _STAGE_1), ("finetune", _STAGE_2)) for packed in ("", "_packed")},
    **{f"llava15_7b_lora{packed}": (27822915584, 1572864, 524288000, 433679593472) for packed in ("", "_packed")},
    **{f"minigpt4_{size}_stage{stage}": PRESETS[f"minigpt4_{size}", _STAGE_1] for size in ("7b", "13b")
       for stage in (1, 2)},
    "tiny_pretrain": PRESETS["tiny", _STAGE_1], "tiny_finetune": PRESETS["tiny", _STAGE_2],
}  # fmt: skip

_SEVEN, _MINIGPT4 = presets.get("llava15_7b"), presets.get("minigpt4_7b")
_PERCEIVER = replace(_SEVEN, projector="perceiver", resampler=PerceiverConfig())
_FLAMINGO = LlavaConfig(clip.L14_224, "flamingo_xattn", llama.LLAMA2_7B, resampler=PerceiverConfig(),
                        cross=CrossConfig(media_width=1024))  # fmt: skip
_FLAMINGO_31 = replace(_FLAMINGO, llm=replace(_FLAMINGO.llm, layers=31))  # the last layers have no gated block
_TIED = replace(_SEVEN, llm=replace(_SEVEN.llm, tie_embeddings=True, added_tokens=3), image_newline=True)
_REST = (".*", None)
_R128, _R16 = Lora(rank=128, alpha=256.0), Lora(rank=16, alpha=256.0)
_ALL_OVER = (("vision/.*|llm/blocks/[qv]/.*|projector/.*", _R16), _REST)
_ADAPTERS, _CONNECTOR = ((".*/lora_[ab]", 1.0), _REST), (("(projector|resampler|ln_vision)/.*", 1.0), _REST)
_GATED = (("resampler/.*|llm/cross/.*", 1.0), _REST)
# name: (model, table `lora`, table `rates`, what was recorded)
OTHERS = {
    "adapters of the decoder, projector frozen": (
        _SEVEN, (("llm/.*", _R128), _REST), _ADAPTERS, (27719106560, 1572864, 524288000, 390193049600)),
    "adapters of tower, projector and decoder": (
        _SEVEN, _ALL_OVER, _ADAPTERS, (25954353152, 1572864, 524288000, 831588913152)),
    "blocks without norms": (
        _SEVEN, (), ((".*/ln[12]/.*", None), ("llm/blocks/.*", 1.0), _REST),
        (38755368960, 1572864, 524288000, 390193049600)),
    "mlps": (
        _SEVEN, (), (("llm/blocks/(gate|up|down)/.*", 1.0), _REST), (34246492160, 1540096, 524288000, 390193049600)),
    "CLIP's blocks": (
        _SEVEN, (), (("vision/blocks/.*", 1.0), _REST), (25904021504, 1572864, 524288000, 1145032691712)),
    "EVA's tower": (
        _MINIGPT4, (), (("vision/.*", 1.0), _REST), (25904021504, 1572864, 524288000, 1587821612544)),
    "Q-Former": (_MINIGPT4, (), _CONNECTOR, (25904021504, 1572864, 524288000, 559566838272)),
    "Q-Former, its input frozen": (
        _MINIGPT4, (), (("ln_vision/.*", None), *_CONNECTOR), (25904021504, 1572864, 524288000, 552897108480)),
    "perceiver": (_PERCEIVER, (), (_CONNECTOR[0], _REST), (25904021504, 1572864, 524288000, 415056883712)),
    "perceiver, forward": (_PERCEIVER, (), (_REST,), (12952010752, 524288, 262144000, 382374866944)),
    "flamingo": (_FLAMINGO, (), _GATED, (31336693760, 1474560, 524288000, 193084878848)),
    "flamingo, forward": (_FLAMINGO, (), (_REST,), (15167651840, 524288, 262144000, 167885500416)),
    "flamingo, everything": (_FLAMINGO, (), ((".*", 1.0),), (45502955520, 1572864, 786432000, 503348219904)),
    "flamingo of 31 layers": (_FLAMINGO_31, (), _GATED, (29696327680, 1425408, 524288000, 192682225664)),
    "flamingo of 31 layers, one gate": (
        _FLAMINGO_31, (), (("llm/cross/ff_gate", 1.0), _REST), (27481473024, 1425408, 524288000, 167751282688)),
    "tied head": (_TIED, (), ((".*", 1.0),), (38856032256, 1572864, 786505728, 1169885515776)),
    "image_newline": (
        _TIED, (), (("image_newline", 1.0), _REST), (25904021504, 1572864, 524337152, 390193049600)),
}  # fmt: skip

# Equal to 0.1 %, all others exactly: a tower of 1,025 positions is cut in two tiles of 513; the formulas gave a factor
# of attention a gradient wherever the other one has one, and a Q-Former's queries one wherever its image has one.
ALMOST = ("minigptv2_7b", "EVA's tower", "flamingo of 31 layers, one gate")
