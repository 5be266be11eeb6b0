"""LLaVA as others keep it: the layouts of its tensors' names, and config.json of both families, both ways."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.convert import clip, llama, unread
from llava_jax.convert.files import TensorFiles
from llava_jax.convert.table import LINEAR, SAME, Row
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models.presets import LlavaConfig
from llava_jax.models.projectors import depth

ORIGINAL_CLASS = "LlavaLlamaForCausalLM"


class Layout(NamedTuple):
    """How tensors are called; every string but `head` and `newline` is the beginning of names.

    Attributes:
      projector: names of the linear layers, by their number in a torch Sequential.
    """

    name: str
    vision: str
    text: str
    head: str
    projector: str
    newline: str


HUB = Layout(
    "hub", "vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.weight",
    "multi_modal_projector.", "image_newline",
)  # fmt: skip
NEW4 = Layout(
    "new4", "model.vision_tower.vision_model.", "model.language_model.", "lm_head.weight",
    "model.multi_modal_projector.", "model.image_newline",
)  # fmt: skip
# transformers 5.6 and later leave "vision_model." out.
LEG5 = HUB._replace(name="leg5", vision="vision_tower.")
NEW5 = NEW4._replace(name="new5", vision="model.vision_tower.")
ORIGINAL = Layout(
    "original", "model.vision_tower.vision_tower.vision_model.", "model.", "lm_head.weight", "model.mm_projector.",
    "model.image_newline",
)  # fmt: skip
IGNORED = (*clip.IGNORED, *llama.IGNORED)


def find_layout(tensors: TensorFiles) -> Layout:
    """Which of the Hugging Face layouts the tensors are in, told from two of their names.

    Raises:
      UnusableCheckpoint: none of them.
    """
    for layout in (HUB, LEG5, NEW4, NEW5):
        marks = (layout.text + "embed_tokens.weight", layout.vision + "embeddings.class_embedding")
        if all(mark in tensors.specs for mark in marks):
            return layout
    shown = ", ".join(list(tensors.specs)[:3])
    raise UnusableCheckpoint(f"{tensors.path}: no LLaVA with a CLIP tower; its tensors are such as {shown}")


def rows(layout: Layout, projector: str) -> list[Row]:
    """The whole model's table in one layout."""
    table = clip.rows(layout.vision) + llama.rows(layout.text, layout.head) + projector_rows(layout, projector)
    return [*table, ("image_newline", (layout.newline, SAME))]


def projector_rows(layout: Layout, projector: str) -> list[Row]:
    """The projector's part of the table.

    Raises:
      ValueError: the layout has no such projector.
    """
    if layout.projector.endswith("mm_projector."):
        # One layer is a bare Linear there, several are a Sequential.
        number = "" if depth(projector) == 1 else r"\1."
        names = [(r"projector/(\d+)", layout.projector + number)]
    elif projector == "mlp2x_gelu":
        names = [(f"projector/{2 * i}", f"{layout.projector}linear_{i + 1}.") for i in range(2)]
    else:
        raise UsageError(f"the Hugging Face format has no projector {projector!r}, only mlp2x_gelu; use --format llava")
    kinds = (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
    return [(f"{ours}/{k}", (theirs + w, axes)) for ours, theirs in names for k, w, axes in kinds]


def projector_kind(names: Sequence[str], prefix: str) -> str:
    """The projector that tensors `prefix` + "weight" (linear) or "0.weight", "2.weight" ... (mlp) belong to."""
    if prefix + "weight" in names:
        return "linear"
    layers = [name for name in names if re.fullmatch(re.escape(prefix) + r"\d+\.weight", name)]
    if not layers:
        shown = ", ".join(list(names)[:3])
        raise UnusableCheckpoint(f"no projector among the tensors {shown} ...; wanted {prefix}0.weight")
    return f"mlp{len(layers)}x_gelu"


def is_original(content: Mapping[str, Any]) -> bool:
    """Whether config.json is the original code's (one flat LLaMA config) and not Hugging Face's (two nested ones)."""
    return "text_config" not in content and any(key.startswith("mm_") for key in content)


def check_hub(content: Mapping[str, Any], where: str) -> None:
    """Refuses the config.json of another model, or of a LLaVA of other parts, by what it calls them.

    Raises:
      UnusableCheckpoint: one of the three model types is another one.
    """
    kind = content.get("model_type", "llava")
    if kind == "llama":
        raise UnusableCheckpoint(
            f"{where}: model_type is 'llama', a language model alone; wanted 'llava'. `convert assemble DST --vision "
            "CLIP_DIR --llm THIS_DIRECTORY` makes a LLaVA of it"
        )
    if kind != "llava":
        raise UnusableCheckpoint(f"{where}: model_type is {kind!r}; wanted 'llava', 'blip-2' or the original code's")
    for name, kinds in (("text", ("llama",)), ("vision", clip.KINDS)):
        part = content.get(f"{name}_config")
        if not isinstance(part, Mapping):
            raise UnusableCheckpoint(f"{where}: {name}_config is missing; wanted transformers' config of that part")
        if part.get("model_type", kinds[0]) not in kinds:
            raise UnusableCheckpoint(f"{where}: {name} model_type is {part['model_type']!r}; wanted {kinds[0]!r}")


def check_original(content: Mapping[str, Any], where: str) -> None:
    """Refuses the original code's config.json where it is of another model than LLaVA-1.0 or 1.5 on a LLaMA.

    Raises:
      UnusableCheckpoint: names the key.
    """
    classes = content.get("architectures") or [ORIGINAL_CLASS]
    if classes != [ORIGINAL_CLASS]:
        raise UnusableCheckpoint(f"{where}: architectures {classes}; wanted {ORIGINAL_CLASS}")
    unread.refuse_original(content, where)


def read_hub_config(content: Mapping[str, Any], where: str, layout: Layout, tensors: TensorFiles) -> LlavaConfig:
    """The model of a Hugging Face config.json.

    Raises:
      UnusableCheckpoint: something in it that this model cannot be.
    """
    check_hub(content, where)
    wanted = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for key, value in wanted.items():
        if content.get(key, value) != value:
            raise UnusableCheckpoint(f"{where}: {key} is {content[key]!r}; wanted {value!r}")
    features = {"default": "patch", "full": "cls_patch"}
    strategy, layer = content.get("vision_feature_select_strategy", "default"), content.get("vision_feature_layer", -2)
    if strategy not in features or not isinstance(layer, int):
        raise UnusableCheckpoint(
            f"{where}: vision_feature_select_strategy {strategy!r}, vision_feature_layer {layer!r}; "
            "wanted default or full, and one number"
        )
    text = content["text_config"]
    tied = content.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    text = llama.with_head(text, bool(tied), tensors, layout.head)
    return LlavaConfig(
        vision=clip.read_config(content["vision_config"], f"{where}: vision_config", layer, features[strategy]),
        projector="mlp2x_gelu",
        llm=llama.read_config(text, f"{where}: text_config"),
        image_newline=False,
    )


def read_original_config(
    content: Mapping[str, Any], where: str, tower: Mapping[str, Any], projector: str
) -> LlavaConfig:
    """The model of the original code's config.json, which does not hold the tower's sizes.

    Args:
      tower: config.json of the CLIP tower.
      projector: told by the tensors; `mm_projector_type` is left out in old files.

    Raises:
      UnusableCheckpoint: something in it that this model cannot be.
    """
    check_original(content, where)
    if content.get("mm_projector_type", projector) != projector:
        said = content["mm_projector_type"]
        raise UnusableCheckpoint(f"{where}: mm_projector_type {said!r}, but the tensors are {projector!r}")
    vision = clip.read_config(
        tower, f"{where}: its tower", content.get("mm_vision_select_layer", -2),
        content.get("mm_vision_select_feature", "patch"),
    )  # fmt: skip
    return LlavaConfig(vision=vision, projector=projector, llm=llama.read_config(content, where), image_newline=False)


def hub_config_json(
    config: LlavaConfig, vocab: int, dtype: str, image_id: int, pad_id: int, ends: Sequence[int | None]
) -> dict:
    """config.json as transformers 4 writes it, with every field explicit; 5.x and vLLM read it too.

    Args:
      vocab: rows of the vocabulary as exported.
      ends: ids of bos and eos.
    """
    text = llama.config_json(config.llm, vocab, dtype)
    text |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "pad_token_id": pad_id}
    text |= {"bos_token_id": ends[0], "eos_token_id": ends[1]}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": image_id,
        "image_seq_length": config.vision.features,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": "default" if config.vision.select_feature == "patch" else "full",
        "tie_word_embeddings": config.llm.tie_embeddings,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": clip.config_json(config.vision),
    }


def original_config_json(config: LlavaConfig, vocab: int, dtype: str, tower: str, in_file: bool, prompt: Any) -> dict:
    """config.json of the original code.

    Args:
      tower: `mm_vision_tower`, what the original code fetches the tower by.
      in_file: the tower's weights lie among the tensors; the original code reads them only when told so.
      prompt: the checkpoint's `PromptCard`.
    """
    return {
        "architectures": [ORIGINAL_CLASS],
        "model_type": "llava",  # transformers knows no "llava_llama"; the original code takes both
        **llama.config_json(config.llm, vocab, dtype),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": in_file,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_select_feature": config.vision.select_feature,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad" if prompt.image_mode == "pad" else "square",
        "mm_use_im_start_end": prompt.image_start_end,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": config.llm.max_positions,
        "tokenizer_padding_side": "right",
    }
