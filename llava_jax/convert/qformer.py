"""The Q-Former of LAVIS and of Hugging Face's BLIP-2, and the norm before it: names of their tensors, their sizes."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_jax.convert.files import TensorFiles, check_numbers
from llava_jax.convert.table import LINEAR, ROW, SAME, Row
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.presets import QFormerConfig

HEAD_WIDTH = 64  # of BERT; LAVIS's files do not say it
# A buffer of BERT's embeddings, and the projections to the language models of BLIP-2.
LAVIS_IGNORED = (r"Qformer\.bert\.embeddings\.position_ids", r"(?:t5|opt)_proj\..*")
_DEFAULTS = {  # of transformers' Blip2QFormerConfig. Source: transformers 4.57.6 and 5.23.0.
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
    "use_qformer_text_input": False,
}  # fmt: skip
_FIXED = {"hidden_act": "gelu", "use_qformer_text_input": False}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "cross_attention_frequency")


class Names(NamedTuple):
    """How tensors are called; `inner` is what stands between an attention's name and its matrices'."""

    norm: str
    queries_norm: str
    layer: str
    inner: str


LAVIS = Names("ln_vision.", "Qformer.bert.embeddings.LayerNorm.", "Qformer.bert.encoder.layer.", "self")
HUB = Names("vision_model.post_layernorm.", "qformer.layernorm.", "qformer.encoder.layer.", "attention")


def rows(names: Names, cross_every: int) -> list[Row]:
    """The table of a Q-Former and of the norm of the tower's features."""
    table: list[Row] = [("resampler/queries", ("query_tokens", ROW))]
    stacks = (("attention", "attention", "{layer}"), ("cross", "crossattention", f"{{layer*{cross_every}}}"))
    words = {"q": "query", "k": "key", "v": "value"}
    for ours, theirs, axes in (("kernel", "weight", LINEAR), ("bias", "bias", SAME)):
        for stack, attention, layer in stacks:
            place = f"{names.layer}{layer}.{attention}."
            table += [
                (f"resampler/{stack}/{letter}/{ours}", (f"{place}{names.inner}.{word}.{theirs}", axes))
                for letter, word in words.items()
            ]
            table.append((f"resampler/{stack}/o/{ours}", (f"{place}output.dense.{theirs}", axes)))
        place = names.layer + "{layer}."
        table += [
            (f"resampler/mlp/fc1/{ours}", (f"{place}intermediate_query.dense.{theirs}", axes)),
            (f"resampler/mlp/fc2/{ours}", (f"{place}output_query.dense.{theirs}", axes)),
        ]
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        table += [
            (f"ln_vision/{ours}", (names.norm + theirs, SAME)),
            (f"resampler/ln/{ours}", (names.queries_norm + theirs, SAME)),
            (f"resampler/mlp/ln/{ours}", (f"{names.layer}{{layer}}.output_query.LayerNorm.{theirs}", SAME)),
        ]
        table += [
            (f"resampler/{stack}/ln/{ours}", (f"{names.layer}{layer}.{attention}.output.LayerNorm.{theirs}", SAME))
            for stack, attention, layer in stacks
        ]
    return table


def read_hub_config(content: Mapping[str, Any], where: str, queries: Any) -> QFormerConfig:
    """A Q-Former's config from transformers' `qformer_config`, and `num_query_tokens` beside it.

    Raises:
      UnusableCheckpoint: not a Q-Former as `models` has it.
    """
    values = {**_DEFAULTS, **content}
    for key, wanted in _FIXED.items():
        if values[key] != wanted:
            raise UnusableCheckpoint(f"{where}: {key} is {values[key]!r}; wanted {wanted!r}, BLIP-2 as released")
    values["num_query_tokens"] = queries
    check_numbers(values, (*_SIZES, "num_query_tokens"), "layer_norm_eps", where)
    return QFormerConfig(
        queries=queries, width=values["hidden_size"], mlp_width=values["intermediate_size"],
        layers=values["num_hidden_layers"], heads=values["num_attention_heads"],
        cross_every=values["cross_attention_frequency"], eps=values["layer_norm_eps"],
    )  # fmt: skip


def hub_config_json(config: QFormerConfig, encoder_width: int) -> dict[str, Any]:
    """The `qformer_config` of transformers, every field that decides a number written out."""
    return {
        "model_type": "blip_2_qformer",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": config.eps,
        "cross_attention_frequency": config.cross_every,
        "encoder_hidden_size": encoder_width,
        "use_qformer_text_input": False,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "vocab_size": 30522,
        "pad_token_id": 0,
    }


def read_lavis_config(tensors: TensorFiles) -> QFormerConfig:
    """The sizes of a Q-Former with LAVIS's names, from its tensors; heads are 64 wide, as BERT's.

    Raises:
      UnusableCheckpoint: no Q-Former is in it.
    """
    specs, pattern = tensors.specs, re.compile(re.escape(LAVIS.layer) + r"(\d+)\.(\w+)\..*")
    found = [match for match in map(pattern.fullmatch, specs) if match]
    layers = {int(match[1]) for match in found}
    looking = sorted({int(match[1]) for match in found if match[2] == "crossattention"})
    every = looking[1] if len(looking) > 1 else len(layers)
    try:
        _, queries, _ = specs["query_tokens"].shape
        mlp_width, width = specs[f"{LAVIS.layer}0.intermediate_query.dense.weight"].shape
    except (KeyError, ValueError):
        shown = ", ".join(list(specs)[:3])
        text = f"{tensors.path}: no Q-Former of BLIP-2 here; its tensors are such as {shown}"
        raise UnusableCheckpoint(text) from None
    if width % HEAD_WIDTH or len(layers) % every or looking != list(range(0, len(layers), every)):
        raise UnusableCheckpoint(
            f"{tensors.path}: a Q-Former of width {width} whose layers {looking} of {len(layers)} look at the image; "
            f"wanted a multiple of {HEAD_WIDTH}, and layer 0 and every n-th after it"
        )
    return QFormerConfig(
        queries=queries, width=width, mlp_width=mlp_width, layers=len(layers), heads=width // HEAD_WIDTH,
        cross_every=every,
    )  # fmt: skip
