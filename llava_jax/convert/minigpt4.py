"""MiniGPT-4 as others keep it: Hugging Face's BLIP-2 with a LLaMA, and the files that the original code joins.

The original has no file of the whole: the tower, the Q-Former with the norm before it, the decoder and the linear
layer (with MiniGPT-v2 also adapters of the decoder) lie apart. Each may also be taken out of a BLIP-2 directory.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.checkpoint import model_json
from llava_jax.convert import llava, unread, views
from llava_jax.convert.files import TensorFiles, open_tensors, read_json
from llava_jax.convert.table import Part
from llava_jax.errors import MissingWeights, UnusableCheckpoint, UsageError
from llava_jax.models import eva, qformer, registry
from llava_jax.models.eva import EvaConfig
from llava_jax.models.names import LINEAR, Row, linear
from llava_jax.models.presets import LlavaConfig
from llava_jax.models.qformer import QFormerConfig

HUB_CLASS, HUB_TYPE = "Blip2ForConditionalGeneration", "blip-2"
LN_EPS = 1e-5  # of the norm after the tower: torch's default, which LAVIS leaves; Hugging Face has the tower's
# What MiniGPT-v2's adapters were scaled by; their checkpoint does not say it. Source: minigpt_v2.py@d94738a.
LORA_ALPHA = 16
TEMPLATES = {"qformer": "minigpt4_chat", "concat4_linear": "minigpt4_llama_2_chat"}
V2_TEMPLATE = "minigptv2"  # of what comes with adapters of the decoder
_TEXT, _HEAD = "language_model.model.", "language_model.lm_head.weight"
_LORA_LAYERS = "llama_model.base_model.model.model.layers"
_LORA = re.compile(rf"({re.escape(_LORA_LAYERS)})\.\d+\.self_attn\.([qkvo])_proj\.lora_([AB])((?:\.default)?)\.weight")
_TOWER_FILE = r"(?:visual_encoder)\..*"
_CONNECTOR_FILE = r"query_tokens|(?:ln_vision|Qformer)\..*"
_LLM_FILE = r"(?:llama_proj|llama_model)\..*"


class Connector(NamedTuple):
    """A pretrained Q-Former with the norm before it."""

    config: QFormerConfig
    part: Part


def is_blip2_family(config: LlavaConfig) -> bool:
    """Whether a model has what no LLaVA has: another tower, or a connector that makes fewer features."""
    fewer = config.resampler is not None or config.projector == "concat4_linear"
    return fewer or config.ln_vision_eps is not None or registry.tower_of(config.vision) is eva.PART


def is_hub(content: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a BLIP-2 of Hugging Face."""
    return content.get("model_type") == HUB_TYPE


def holds_eva(path: epath.PathLike) -> bool:
    """Whether that is a file of tensors or a BLIP-2 directory, and no CLIP directory.

    Raises:
      FileNotFoundError: it is not there.
    """
    _want(epath.Path(path), "a CLIP directory, eva_vit_g.pth or a BLIP-2 directory")
    file = epath.Path(path) / "config.json"
    return files.is_file(path) or (files.is_file(file) and is_hub(read_json(file)))


def read_hub(content: Mapping[str, Any], where: str, tensors: TensorFiles, ln_eps: float | None) -> LlavaConfig:
    """The model of a Hugging Face config.json.

    Args:
      ln_eps: of the norm after the tower, where an export of ours kept it; None: the tower's, as Hugging Face has it.

    Raises:
      UnusableCheckpoint: something in it that this model cannot be.
    """
    text = _section(content, "text_config", where)
    decoders = registry.decoders()
    if text.get("model_type") not in list(decoders):
        raise UnusableCheckpoint(
            f"{where}: text model_type is {text.get('model_type')!r}; wanted one of {', '.join(decoders)}. Tower and "
            "Q-Former can still be had of it: `assemble --vision DIR --connector DIR --llm LLAMA_DIR`"
        )
    sizes = _section(content, "vision_config", where)
    vision = unread.read_part(eva.PART, sizes, f"{where}: vision_config", -1, "cls_patch")
    text = llava.with_head(text, where, tensors, _HEAD, content)
    return LlavaConfig(
        vision=vision, projector="qformer",
        llm=unread.read_part(decoders[text["model_type"]], text, f"{where}: text_config"),
        ln_vision_eps=vision.eps if ln_eps is None else ln_eps, resampler=_hub_qformer(content, where),
    )  # fmt: skip


def hub_part(config: LlavaConfig, tensors: TensorFiles) -> Part:
    """All parameters of a model out of a Hugging Face directory."""
    return Part(("",), views.with_split_biases(tensors), hub_rows(config))


def hub_rows(config: LlavaConfig) -> list[Row]:
    """The whole model's table in Hugging Face's names."""
    assert isinstance(config.resampler, QFormerConfig)
    return [
        *eva.rows(eva.HUB, eva.HUB_PREFIX),
        *qformer.rows(qformer.HUB, config.resampler.cross_every),
        *projection_rows("language_projection."),
        *registry.decoder_of(config.llm).rows(_TEXT, _HEAD),
    ]


def lavis_rows(config: LlavaConfig) -> list[Row]:
    """The table of all but the decoder, in the names of the original's own state dict."""
    assert isinstance(config.resampler, QFormerConfig)
    connector = qformer.rows(qformer.LAVIS, config.resampler.cross_every)
    return [*eva.rows(eva.LAVIS, eva.LAVIS_PREFIX), *connector, *projection_rows("llama_proj.")]


def projection_rows(prefix: str) -> list[Row]:
    """The table of the linear layer."""
    return linear("projector/0", prefix[:-1])


def adapter_rows(default: str = ".default") -> list[Row]:
    """The table of the decoder's adapters; `default` is what newer versions of peft put into their names."""
    return [
        (f"llm/blocks/([qkvo])/lora_{half.lower()}",
         (rf"{_LORA_LAYERS}.{{layer}}.self_attn.\1_proj.lora_{half}{default}.weight", LINEAR))
        for half in "AB"
    ]  # fmt: skip


def tower(path: epath.Path, select_feature: str, image_size: int | None) -> tuple[EvaConfig, Part]:
    """The tower out of a file with LAVIS's names, or of a BLIP-2 directory.

    Args:
      image_size: positions are interpolated to it; None leaves them.

    Raises:
      UnusableCheckpoint: there is none in it.
    """
    if files.is_file(path):
        tensors = open_tensors(path)
        config, prefix, ignored = eva.read_lavis_config(views.shapes(tensors), str(tensors.path), select_feature)
        names, ignored = eva.LAVIS, (*ignored, *qformer.LAVIS_IGNORED, _CONNECTOR_FILE, _LLM_FILE)
    else:
        content, tensors = _open_hub(path)
        where = str(path / "config.json")
        sizes = _section(content, "vision_config", where)
        config = unread.read_part(eva.PART, sizes, f"{where}: vision_config", -1, select_feature)
        names, prefix, tensors = eva.HUB, eva.HUB_PREFIX, views.with_split_biases(tensors)
        ignored = (r"(?!vision_model\.).*", r"vision_model\.post_layernorm\..*")
    if image_size is not None and image_size != config.image_size:
        config = EvaConfig(**vars(config) | {"image_size": image_size})
        tensors = views.resized(tensors, prefix + names.pos, image_size // config.patch_size, True)
    return config, Part(("vision/",), tensors, eva.rows(names, prefix), ignored)


def connector(path: epath.Path) -> Connector:
    """The Q-Former and the norm before it, out of a file with LAVIS's names or of a BLIP-2 directory.

    Raises:
      FileNotFoundError: it is not there. UnusableCheckpoint: there is none in it.
    """
    leaves = ("resampler/", "ln_vision/")
    _want(path, "blip2_pretrained_*.pth or a BLIP-2 directory")
    if files.is_file(path):
        tensors = open_tensors(path)
        config = qformer.read_lavis_config(views.shapes(tensors), str(tensors.path))
        ignored = (*qformer.LAVIS_IGNORED, _TOWER_FILE, _LLM_FILE)
        return Connector(config, Part(leaves, tensors, qformer.rows(qformer.LAVIS, config.cross_every), ignored))
    content, tensors = _open_hub(path)
    config = _hub_qformer(content, str(path / "config.json"))
    ignored = (r"(?!query_tokens|qformer\.|vision_model\.post_layernorm\.).*",)
    return Connector(config, Part(leaves, tensors, qformer.rows(qformer.HUB, config.cross_every), ignored))


def projection(tensors: TensorFiles) -> list[Part] | None:
    """The parts in a checkpoint of the original: its linear layer, and MiniGPT-v2's adapters; None: no such file."""
    if "llama_proj.weight" not in tensors.specs:
        return None
    found = [match for match in map(_LORA.fullmatch, tensors.specs) if match]
    others = (_TOWER_FILE, _CONNECTOR_FILE, *qformer.LAVIS_IGNORED)
    linear = Part(("projector/",), tensors, projection_rows("llama_proj."), (*others, _LORA.pattern))
    if not found:
        return [linear]
    rows = adapter_rows(found[0][4])
    letters = sorted({match[2] for match in found})
    leaves = tuple(f"llm/blocks/{letter}/lora_{half}" for letter in letters for half in "ab")
    return [linear, Part(leaves, tensors, rows, (*others, r"llama_proj\..*"))]


def adapters(parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """{our kernel: (rank, alpha)} of the adapters in `projection`'s parts.

    Raises:
      UnusableCheckpoint: one of their tensors is no matrix.
    """
    found = {}
    for part in parts:
        for match in filter(None, map(_LORA.fullmatch, part.tensors.specs)):
            shape = part.tensors.specs[match[0]].shape
            if len(shape) != 2 or not min(shape):
                raise UnusableCheckpoint(f"{part.tensors.path}: {match[0]} has shape {shape}; wanted a matrix")
            if match[3] == "A":
                found[f"llm/blocks/{match[2]}/kernel"] = (shape[0], LORA_ALPHA)
    return found


def legacy(llm: epath.Path) -> bool | None:
    """True for a LLaMA's words, None for others, which have no such switch.

    The original's environment.yml pins transformers 4.30, which cuts them in the older way, whatever their files say.
    """
    return True if files.is_file(llm / "tokenizer.model") else None


def hub_config_json(
    config: LlavaConfig, vocab: int, dtype: str, image_id: int, pad_id: int, ends: Sequence[int | None]
) -> dict[str, Any]:
    """config.json as transformers 4 writes it, with every field explicit; 5.x reads it too.

    Raises:
      ValueError: the format has no such model.
    """
    if not isinstance(config.vision, EvaConfig) or not isinstance(config.resampler, QFormerConfig):
        raise UsageError(
            f"the Hugging Face format has no model with the connector {config.projector!r} on this tower; only EVA "
            "with a Q-Former (BLIP-2) and LLaVA with mlp2x_gelu. `convert merge` writes a whole checkpoint of our own"
        )
    return {
        "architectures": [HUB_CLASS],
        "model_type": HUB_TYPE,
        "image_token_index": image_id,
        "num_query_tokens": config.resampler.queries,
        "use_decoder_only_language_model": True,
        "image_text_hidden_size": 256,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.llm.tie_embeddings,
        "torch_dtype": dtype,
        "text_config": llava.text_config(config, vocab, dtype, pad_id, ends),
        "vision_config": eva.config_json(config.vision),
        "qformer_config": qformer.hub_config_json(config.resampler, config.vision.width),
    }


def _hub_qformer(content: Mapping[str, Any], where: str) -> QFormerConfig:
    queries = content.get("num_query_tokens", 32)
    return qformer.read_hub_config(_section(content, "qformer_config", where), f"{where}: qformer_config", queries)


def _section(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    part = content.get(key)
    if not isinstance(part, dict):
        raise UnusableCheckpoint(f"{where}: {key} is missing; wanted transformers' config of that part")
    return part


def _want(path: epath.Path, what: str) -> None:
    if not files.exists(path):
        raise MissingWeights(f"{path}: no such file or directory; wanted {what}{model_json.download(path)}")


def _open_hub(directory: epath.Path) -> tuple[dict[str, Any], TensorFiles]:
    content = read_json(directory / "config.json")
    unread.refuse_quantised(content, str(directory))
    if not is_hub(content):
        raise UnusableCheckpoint(f"{directory}: model_type is {content.get('model_type')!r}; wanted {HUB_TYPE!r}")
    return content, open_tensors(directory)
