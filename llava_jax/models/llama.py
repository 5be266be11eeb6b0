"""LLaMA 1, 2, 3, 3.1 and 3.2, and how transformers keeps a decoder of its form: tensors' names and config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.decoder import LanguageModel
from llava_jax.models.names import LINEAR, SAME, Row
from llava_jax.models.parts import (
    NUMBERS,
    Content,
    Decoder,
    DecoderConfig,
    GgufDecoder,
    RopeScaling,
    check_fixed,
    check_numbers,
)  # fmt: skip

# Defaults of transformers' LlamaConfig, which config.json may leave out. Source: transformers 4.57.6 and 5.23.0.
DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": None, "rope_scaling": None,
    "rope_parameters": None, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "sliding_window": None, "use_sliding_window": True, "layer_types": None,
}  # fmt: skip
# What `models` has no other form of.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_ROPE = {  # RopeScaling's fields of "llama3" -> their names
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}  # fmt: skip
_ROPE_KINDS = {  # rope_type -> what its object must have
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", *_ROPE.values()),
}  # fmt: skip
_ROPE_NUMBERS = ("rope_theta", *_ROPE_KINDS["llama3"])


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """A LLaMA decoder."""


class Llama(LanguageModel):
    """Embeddings in, normed hidden states out."""

    config: LlamaConfig


def rows(prefix: str, head: str) -> list[Row]:
    """The table of a decoder whose tensors begin with `prefix` (`model.`) and whose output matrix is `head`."""
    layer = prefix + "layers.{layer}."
    return [
        ("llm/embed/table", (prefix + "embed_tokens.weight", SAME)),
        ("llm/blocks/ln1/scale", (layer + "input_layernorm.weight", SAME)),
        ("llm/blocks/ln2/scale", (layer + "post_attention_layernorm.weight", SAME)),
        ("llm/blocks/([qkvo])/kernel", (layer + r"self_attn.\1_proj.weight", LINEAR)),
        ("llm/blocks/(gate|up|down)/kernel", (layer + r"mlp.\1_proj.weight", LINEAR)),
        ("llm/norm/scale", (prefix + "norm.weight", SAME)),
        ("llm/head/kernel", (head, LINEAR)),
    ]


# Source: gguf 0.19.0 constants.py TENSOR_NAMES; llama.cpp conversion/llama.py (the order of rotary halves).
GGUF_ROWS: list[Row] = [
    ("llm/embed/table", ("token_embd.weight", SAME)),
    ("llm/blocks/ln1/scale", ("blk.{layer}.attn_norm.weight", SAME)),
    ("llm/blocks/ln2/scale", ("blk.{layer}.ffn_norm.weight", SAME)),
    ("llm/blocks/([qkv])/kernel", (r"blk.{layer}.attn_\1.weight", LINEAR)),
    ("llm/blocks/o/kernel", ("blk.{layer}.attn_output.weight", LINEAR)),
    ("llm/blocks/(gate|up|down)/kernel", (r"blk.{layer}.ffn_\1.weight", LINEAR)),
    ("llm/norm/scale", ("output_norm.weight", SAME)),
    ("llm/head/kernel", ("output.weight", LINEAR)),
]
GGUF = GgufDecoder("llama", GGUF_ROWS, paired=True, scalings=("linear", "llama3"))


def read_config(content: Content, where: str) -> LlamaConfig:
    """A decoder's config from config.json (transformers 4 or 5) or LLaVA's `text_config`.

    Raises:
      UnusableCheckpoint: not a LLaMA as `models` has it.
    """
    values = {**DEFAULTS, **content}
    check_fixed(values, _FIXED, where, "LLaMA")
    sizes = read_sizes(values, where)
    refuse_window(values, where, "LLaMA")
    return LlamaConfig(**sizes)


def refuse_window(values: Content, where: str, name: str) -> None:
    """Raises UnusableCheckpoint where some layer does not see the whole text."""
    window, layers = values["sliding_window"] if values["use_sliding_window"] else None, values["layer_types"]
    whole = layers is None or (isinstance(layers, list) and set(map(str, layers)) == {"full_attention"})
    if window is not None or not whole:
        raise UnusableCheckpoint(
            f"{where}: sliding_window is {window!r}, layer_types {str(layers)[:60]}; wanted neither: all layers of a "
            f"{name} see the whole text"
        )


def read_sizes(values: Content, where: str) -> dict[str, Any]:
    """The fields of a DecoderConfig out of a config.json filled with its kind's defaults.

    Raises:
      UnusableCheckpoint: a size that is none, or rotary positions of another kind.
    """
    optional = [key for key in ("num_key_value_heads", "head_dim") if values[key] is not None]
    check_numbers(values, (*_SIZES, *optional), "rms_norm_eps", where)
    heads = values["num_attention_heads"]
    kv_heads, head_width = values["num_key_value_heads"] or heads, values["head_dim"] or values["hidden_size"] // heads
    if heads % kv_heads:
        raise UnusableCheckpoint(
            f"{where}: num_key_value_heads is {kv_heads}; wanted a divisor of num_attention_heads={heads}"
        )
    if head_width % 2:
        raise UnusableCheckpoint(f"{where}: head_dim is {head_width}; wanted an even number (rotary halves)")
    theta, scaling = _read_rope(values, where)
    return {
        "vocab": values["vocab_size"], "width": values["hidden_size"], "mlp_width": values["intermediate_size"],
        "layers": values["num_hidden_layers"], "heads": heads, "kv_heads": kv_heads, "head_width": head_width,
        "eps": float(values["rms_norm_eps"]),
        "rope_theta": theta, "rope_scaling": scaling, "max_positions": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
    }  # fmt: skip


def _read_rope(values: Content, where: str) -> tuple[float, RopeScaling | None]:
    """transformers 5 keeps all in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    new, old = (_rope_object(values[key] or {}, f"{where}: {key}") for key in ("rope_parameters", "rope_scaling"))
    _check_rope_number("rope_theta", values["rope_theta"], where)
    if values.get("partial_rotary_factor") not in (None, 1):
        raise UnusableCheckpoint(f"{where}: partial_rotary_factor is {values['partial_rotary_factor']!r}; wanted 1")
    thetas = {float(theta) for theta in (new.get("rope_theta"), values["rope_theta"]) if theta is not None}
    if len(thetas) > 1:
        raise UnusableCheckpoint(f"{where}: rope_theta {sorted(thetas)}, in rope_parameters and beside it; want one")
    scalings = {_scaling(part) for part in (new, old) if part}
    if len(scalings) > 1:
        raise UnusableCheckpoint(f"{where}: rope_parameters {new} and rope_scaling {old} differ; want one")
    return next(iter(thetas), 10000.0), next(iter(scalings), None)


def _rope_object(part: Any, where: str) -> Content:
    """An object of config.json about rotary positions. Raises UnusableCheckpoint: not such as `models` has them."""
    if not isinstance(part, Mapping):
        raise UnusableCheckpoint(f"{where} is {part!r}; wanted null or an object with a rope_type")
    kind = _rope_kind(part)
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        raise UnusableCheckpoint(f"{where}: rope scaling {kind!r}; wanted one of {', '.join(_ROPE_KINDS)}")
    for key, value in part.items():
        whole = key == "partial_rotary_factor" and value == 1  # all of a head is rotated
        if key in _ROPE_NUMBERS:
            _check_rope_number(key, value, where)
        elif key not in ("rope_type", "type") and value is not None and not whole:
            shown = ", ".join(_ROPE_NUMBERS)
            raise UnusableCheckpoint(f"{where}: {key} is {str(value)[:60]}; wanted no key but {shown}")
    missing = [key for key in _ROPE_KINDS[kind] if part.get(key) is None]
    if missing:
        raise UnusableCheckpoint(f"{where}: {missing[0]} is missing; wanted a number for rope_type {kind!r}")
    return part


def _check_rope_number(key: str, value: Any, where: str) -> None:
    kinds = (int,) if key == "original_max_position_embeddings" else NUMBERS
    if value is not None and not (type(value) in kinds and value > 0):
        kind = "whole number" if kinds == (int,) else "number"
        raise UnusableCheckpoint(f"{where}: {key} is {value!r}; wanted null or a {kind} above 0")


def _rope_kind(part: Content) -> Any:
    return part.get("rope_type", part.get("type", "default"))


def _scaling(part: Content) -> RopeScaling | None:
    kind = _rope_kind(part)
    if kind == "default":
        return None
    if kind != "llama3":
        return RopeScaling(kind, float(part["factor"]))
    low, high, positions = (part[key] for key in _ROPE.values())
    return RopeScaling(kind, float(part["factor"]), float(low), float(high), positions)


def config_json(config: DecoderConfig, vocab: int, dtype: str) -> dict[str, Any]:
    """A decoder's keys of a transformers 4 config, every field written out.

    transformers 4.57 ignores `rope_parameters` and takes theta 10,000 instead; 5.x reads the old keys.
    """
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": config.eps,
        "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_json(config.rope_scaling),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    own = _ROPE if scaling.kind == "llama3" else {}
    values = {theirs: vars(scaling)[ours] for ours, theirs in own.items()}
    return {"rope_type": scaling.kind, "factor": scaling.factor} | values


# Source: the config.json of the released checkpoints; LLaMA-1 (Vicuna v0 to v1.3) has eps 1e-6 and 2,048 positions,
# Llama-2 (Vicuna v1.5) eps 1e-5 and 4,096.
LLAMA2_7B = LlamaConfig(
    vocab=32000, width=4096, mlp_width=11008, layers=32, heads=32, kv_heads=32, head_width=128
)  # fmt: skip
LLAMA2_13B = replace(LLAMA2_7B, width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40)
LLAMA1_7B = replace(LLAMA2_7B, eps=1e-6, max_positions=2048)
LLAMA1_13B = replace(LLAMA2_13B, eps=1e-6, max_positions=2048)
LLAMA3_8B = LlamaConfig(
    vocab=128256, width=4096, mlp_width=14336, layers=32, heads=32, kv_heads=8, head_width=128, rope_theta=500000.0,
    max_positions=8192,
)  # fmt: skip
LLAMA31_8B = replace(
    LLAMA3_8B, max_positions=131072, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
)  # fmt: skip

PART = Decoder(
    kind="llama", label="a LLaMA", config=LlamaConfig, module=Llama, rows=rows, read_config=read_config,
    config_json=config_json, hub_class="LlamaForCausalLM", original=("LlavaLlamaForCausalLM", "llava"),
    template="v1", gguf=GGUF,
)  # fmt: skip
