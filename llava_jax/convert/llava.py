"""LLaVA as others keep it: the layouts of its tensors' names, and config.json of both families, both ways."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.convert import tiling, unread
from llava_jax.convert.files import TensorFiles
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.models import mlp, registry
from llava_jax.models.names import SAME, Row, linear
from llava_jax.models.parts import Decoder, Tower
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import anyres
from llava_jax.prompt.anyres import Tiling


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


def find_layout(tensors: TensorFiles, tower: Tower) -> Layout:
    """Which of the Hugging Face layouts the tensors are in, told from two of their names.

    Raises:
      UnusableCheckpoint: none of them.
    """
    for layout in (HUB, LEG5, NEW4, NEW5):
        marks = (layout.text + "embed_tokens.weight", layout.vision + tower.mark)
        if all(mark in tensors.specs for mark in marks):
            return layout
    shown = ", ".join(list(tensors.specs)[:3])
    raise UnusableCheckpoint(f"{tensors.path}: no LLaVA with {tower.label} tower; its tensors are such as {shown}")


def rows(layout: Layout, config: LlavaConfig) -> list[Row]:
    """The whole model's table in one layout."""
    return [*parts_rows(layout, config), *projector_rows(layout, config.projector)]


def parts_rows(layout: Layout, config: LlavaConfig) -> list[Row]:
    """The table of all but the projector."""
    tower, decoder = registry.tower_of(config.vision), registry.decoder_of(config.llm)
    table = [*tower.rows(layout.vision), *decoder.rows(layout.text, layout.head)]
    return [*table, ("image_newline", (layout.newline, SAME))]


def first_layers(config: LlavaConfig) -> dict[str, int]:
    """Where the stacks of a model begin in their numbering."""
    return registry.tower_of(config.vision).first_layers(config.vision)


def ignored(config: LlavaConfig) -> tuple[str, ...]:
    """Patterns over names in files of these parts that are nothing of the model."""
    return registry.tower_of(config.vision).ignored + registry.decoder_of(config.llm).ignored


def projector_rows(layout: Layout, projector: str) -> list[Row]:
    """The projector's part of the table.

    Raises:
      ValueError: the layout has no such projector.
    """
    if layout.projector.endswith("mm_projector."):
        return registry.connector(projector).rows(projector, layout.projector)
    if projector != "mlp2x_gelu":
        raise UsageError(f"the Hugging Face format has no projector {projector!r}, only mlp2x_gelu; use --format llava")
    return [row for i in range(2) for row in linear(f"projector/{2 * i}", f"{layout.projector}linear_{i + 1}")]


def projector_kind(names: Sequence[str], prefix: str, content: Mapping[str, Any]) -> str:
    """The projector that tensors `prefix` + "weight" (linear) or "0.weight", "2.weight" ... (mlp) belong to; one that
    config.json names and that is no mere layers is taken by its word."""
    kind = content.get("mm_projector_type")
    if isinstance(kind, str) and not re.fullmatch(mlp.PLAIN.name, kind):
        registry.connector(kind)
        return kind
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


def hub_parts(content: Mapping[str, Any], where: str) -> tuple[Tower, Decoder]:
    """The parts of a Hugging Face LLaVA, by what its config.json calls them.

    Raises:
      UnusableCheckpoint: it is another model, or of parts that are not here.
    """
    kind = content.get("model_type", tiling.PLAIN)
    towers, decoders = registry.towers().values(), registry.decoders()
    if kind in list(decoders):
        raise UnusableCheckpoint(
            f"{where}: model_type is {kind!r}, a language model alone; wanted 'llava'. `convert assemble DST --vision "
            "TOWER_DIR --llm THIS_DIRECTORY` makes a LLaVA of it"
        )
    if kind not in list(tiling.HUBS):
        wanted = ", ".join(map(repr, tiling.HUBS))
        raise UnusableCheckpoint(f"{where}: model_type is {kind!r}; wanted {wanted}, 'blip-2' or the original code's")
    hub = tiling.HUBS[kind]
    architectures = content.get("architectures")
    if architectures and architectures != [f"{hub.name}ForConditionalGeneration"]:
        raise UnusableCheckpoint(
            f"{where}: model_type is {kind!r}, architectures are {architectures}; wanted "
            f"{hub.name}ForConditionalGeneration: want one model's"
        )
    known = {
        "text": (hub.text, {name: part for name, part in decoders.items()}),
        "vision": (hub.vision, {name: part for part in towers for name in part.model_types}),
    }
    found = []
    for name, (usual, kinds) in known.items():
        part = content.get(f"{name}_config")
        if not isinstance(part, Mapping):
            raise UnusableCheckpoint(f"{where}: {name}_config is missing; wanted transformers' config of that part")
        found.append(unread.part_of(part.get("model_type", usual), kinds, f"{where}: {name}"))
    return found[1], found[0]


def original_decoder(content: Mapping[str, Any], where: str) -> Decoder:
    """The decoder of the original code's config.json, refused where it is of another model than LLaVA-1.0 or 1.5.

    Raises:
      UnusableCheckpoint: names the key.
    """
    unread.refuse_original(content, where)
    decoders = registry.decoders().values()
    classes = {part.original[0]: part for part in decoders}
    # Files of the first LLaVA say "llava" or their decoder's own type.
    types = {name: part for part in decoders for name in (part.original[1], f"llava_{part.kind}", part.kind)}
    names, kind = content.get("architectures"), content.get("model_type") or "llava"
    if names and names not in [[name] for name in classes]:
        raise UnusableCheckpoint(f"{where}: architectures {names}; wanted one of {', '.join(classes)}")
    part = unread.part_of(kind, types, f"{where}:")
    if names and kind != "llava" and part is not classes[names[0]]:
        raise UnusableCheckpoint(f"{where}: model_type is {kind!r}, architectures name a {names[0]}; want one model's")
    return classes[names[0]] if names else part


def read_hub_config(content: Mapping[str, Any], where: str, layout: Layout, tensors: TensorFiles) -> LlavaConfig:
    """The model of a Hugging Face config.json.

    Raises:
      UnusableCheckpoint: something in it that this model cannot be.
    """
    tower, decoder = hub_parts(content, where)
    wanted = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for key, value in wanted.items():
        if content.get(key, value) != value:
            raise UnusableCheckpoint(f"{where}: {key} is {content[key]!r}; wanted {value!r}")
    hub = tiling.HUBS[content.get("model_type", tiling.PLAIN)]
    tiled = hub is not tiling.HUBS[tiling.PLAIN]
    features = {"default": "patch", "full": "cls_patch"} if tower.class_token else {"full": "patch"}
    if tower.class_token and tiled:
        del features["full"]  # a class token has no place among the lines of tiles
    strategy = content.get("vision_feature_select_strategy", hub.strategy)
    layer = content.get("vision_feature_layer", hub.layer)
    if strategy not in list(features) or type(layer) is not int:
        raise UnusableCheckpoint(
            f"{where}: vision_feature_select_strategy {strategy!r}, vision_feature_layer {layer!r}; "
            f"wanted {' or '.join(features)}, and one number"
        )
    text = content["text_config"]
    text = with_head(text, where, tensors, layout.head, content)
    return LlavaConfig(
        vision=unread.read_part(tower, content["vision_config"], f"{where}: vision_config", layer, features[strategy]),
        projector="mlp2x_gelu",
        llm=unread.read_part(decoder, text, f"{where}: text_config"),
        image_newline=tiled,
    )


def with_head(
    content: Mapping[str, Any], where: str, tensors: TensorFiles, head: str, around: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config with embeddings tied only where the output matrix is not stored, since what is stored counts.

    Args:
      around: the config.json that `content` is an object of; either may say it.

    Raises:
      UnusableCheckpoint: what they say is no truth value.
    """
    values = [part.get("tie_word_embeddings") for part in (content, around or {})]
    wrong = [value for value in values if value is not None and not isinstance(value, bool)]
    if wrong:
        raise UnusableCheckpoint(f"{where}: tie_word_embeddings is {wrong[0]!r}; wanted true or false")
    return {**content, "tie_word_embeddings": any(values) and head not in tensors.specs}


def read_original_config(
    content: Mapping[str, Any], where: str, tower: Tower, sizes: Mapping[str, Any], tensors: TensorFiles
) -> LlavaConfig:
    """The model of the original code's config.json, which does not hold the tower's sizes.

    Args:
      sizes: config.json of the tower.
      tensors: they tell the projector, as `mm_projector_type` is left out in old files, whether there is an
        `image_newline`, and whether a tower among them is cut.

    Raises:
      UnusableCheckpoint: something in it that this model cannot be.
    """
    decoder = original_decoder(content, where)
    projector = projector_kind(list(tensors.specs), ORIGINAL.projector, content)
    if content.get("mm_projector_type", projector) != projector:
        kind = content["mm_projector_type"]
        raise UnusableCheckpoint(f"{where}: mm_projector_type {kind!r}, but the tensors are {projector!r}")
    feature = content.get("mm_vision_select_feature", "patch") if tower.class_token else "patch"  # it reads all anyway
    layer = content.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise UnusableCheckpoint(f"{where}: mm_vision_select_layer is {layer!r}; wanted one number")
    vision = unread.read_part(tower, sizes, f"{where}: its tower", layer, feature)
    if _blocks(tensors, ORIGINAL.vision) == tower.kept(vision).layers:
        vision = tower.kept(vision)
    llm = unread.read_part(decoder, content, where)
    newline = ORIGINAL.newline in tensors.specs or content.get("mm_patch_merge_type") == "spatial_unpad"
    return LlavaConfig(vision=vision, projector=projector, llm=llm, image_newline=newline)


def _blocks(tensors: TensorFiles, prefix: str) -> int:
    """Blocks of the tower whose tensors begin with `prefix`; 0 where it is not among them."""
    found = (re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", name) for name in tensors.specs)
    return len({match[1] for match in found if match})


def hub_config_json(
    config: LlavaConfig, tiles: Tiling | None, vocab: int, dtype: str, image_id: int, pad_id: int,
    ends: Sequence[int | None],
) -> dict:  # fmt: skip
    """config.json as transformers 4 writes it, with every field explicit; 5.x and vLLM read it too.

    Args:
      vocab: rows of the vocabulary as exported.
      ends: ids of bos and eos.
    """
    tower, kind = registry.tower_of(config.vision), tiling.hub_kind(tiles)
    whole = config.vision.select_feature == "cls_patch" or not tower.class_token
    return {
        "architectures": [f"{tiling.HUBS[kind].name}ForConditionalGeneration"],
        "model_type": kind,
        "ignore_index": -100,
        "image_token_index": image_id,
        "image_seq_length": config.vision.features,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": "full" if whole else "default",
        **tiling.hub_json(tiles, config.vision.image_size),
        "tie_word_embeddings": config.llm.tie_embeddings,
        "torch_dtype": dtype,
        "text_config": text_config(config, vocab, dtype, pad_id, ends),
        "vision_config": tower.config_json(config.vision),
    }


def text_config(config: LlavaConfig, vocab: int, dtype: str, pad_id: int, ends: Sequence[int | None]) -> dict[str, Any]:
    """The `text_config` of a Hugging Face model; arguments as of `hub_config_json`."""
    part = registry.decoder_of(config.llm)
    ids = {"pad_token_id": pad_id, "bos_token_id": ends[0], "eos_token_id": ends[1]}
    return part.config_json(config.llm, vocab, dtype) | {"architectures": [part.hub_class]} | ids


def original_config_json(
    config: LlavaConfig, vocab: int, dtype: str, tower: str, in_file: bool, select_layer: int, prompt: Any
) -> dict:
    """config.json of the original code.

    Args:
      tower: `mm_vision_tower`, what the original code fetches the tower by.
      in_file: the tower's weights lie among the tensors; the original code reads them only when told so.
      select_layer: counted in the tower as it is fetched.
      prompt: the checkpoint's `PromptMetadata`.
    """
    decoder, tiles = registry.decoder_of(config.llm), anyres.from_json(prompt.image_mode, prompt.tiling)
    return {
        **decoder.config_json(config.llm, vocab, dtype),
        "architectures": [decoder.original[0]],
        "model_type": decoder.original[1],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": in_file,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": select_layer,
        "mm_vision_select_feature": config.vision.select_feature,
        "image_aspect_ratio": "pad" if prompt.image_mode == "pad" else "square",
        **tiling.original_json(tiles, config.vision.image_size),
        **tiling.original_video_json(prompt.video),
        "mm_use_im_start_end": prompt.image_start_end,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": config.llm.max_positions,
        "tokenizer_padding_side": "right",
    }
