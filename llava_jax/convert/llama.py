"""LLaMA decoders of Hugging Face: names of their tensors, and their config.json, both ways."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax.convert import unread
from llava_jax.convert.files import TensorFiles, check_numbers, open_tensors, read_json
from llava_jax.convert.table import LINEAR, SAME, Row
from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.presets import LlamaConfig, RopeScaling

IGNORED = (r".*\brotary_emb\.inv_freq",)
# Defaults of transformers' LlamaConfig, which config.json may leave out. Source: transformers 4.57.6 and 5.23.0.
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": None, "rope_scaling": None,
    "rope_parameters": None, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None, "use_sliding_window": True,
    "layer_types": None,
}  # fmt: skip
# What `models` has no other form of.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


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


def read_config(content: Mapping[str, Any], where: str) -> LlamaConfig:
    """A decoder's config from config.json (transformers 4 or 5) or LLaVA's `text_config`.

    Raises:
      UnusableCheckpoint: not a LLaMA as `models` has it.
    """
    values = {**_DEFAULTS, **content}
    for key, wanted in _FIXED.items():
        if values[key] != wanted:
            raise UnusableCheckpoint(f"{where}: {key} is {values[key]!r}; wanted {wanted!r}, LLaMA as released")
    optional = [key for key in ("num_key_value_heads", "head_dim") if values[key]]
    check_numbers(values, (*_SIZES, *optional), "rms_norm_eps", where)
    window, layers = values["sliding_window"] if values["use_sliding_window"] else None, values["layer_types"]
    if window is not None or layers not in (None, ["full_attention"] * values["num_hidden_layers"]):
        raise UnusableCheckpoint(
            f"{where}: sliding_window is {window!r}, layer_types {str(layers)[:60]}; wanted neither: all layers of a "
            "LLaMA see the whole text"
        )
    heads = values["num_attention_heads"]
    theta, scaling = _read_rope(values, where)
    return LlamaConfig(
        vocab=values["vocab_size"], width=values["hidden_size"], mlp_width=values["intermediate_size"],
        layers=values["num_hidden_layers"], heads=heads, kv_heads=values["num_key_value_heads"] or heads,
        head_width=values["head_dim"] or values["hidden_size"] // heads, eps=values["rms_norm_eps"],
        rope_theta=theta, rope_scaling=scaling, max_positions=values["max_position_embeddings"],
        tie_embeddings=values["tie_word_embeddings"],
    )  # fmt: skip


def _read_rope(values: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """transformers 5 keeps all in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    new, old = values["rope_parameters"] or {}, values["rope_scaling"] or {}
    thetas = {float(theta) for theta in (new.get("rope_theta"), values["rope_theta"]) if theta is not None}
    if len(thetas) > 1:
        raise UnusableCheckpoint(f"{where}: rope_theta {sorted(thetas)}, in rope_parameters and beside it; want one")
    scalings = {_scaling(part, where) for part in (new, old) if part}
    if len(scalings) > 1:
        raise UnusableCheckpoint(f"{where}: rope_parameters {new} and rope_scaling {old} differ; want one")
    return next(iter(thetas), 10000.0), next(iter(scalings), None)


def _scaling(part: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = part.get("rope_type", part.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic"):
        raise UnusableCheckpoint(f"{where}: rope scaling {kind!r}; wanted default, linear or dynamic")
    return RopeScaling(kind, float(part["factor"]))


def config_json(config: LlamaConfig, vocab: int, dtype: str) -> dict[str, Any]:
    """The LLaMA keys of a transformers 4 config, every field written out.

    transformers 4.57 ignores `rope_parameters` and takes theta 10,000 instead; 5.x reads the old keys.
    """
    scaling = config.rope_scaling
    return {
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
        "rope_scaling": None if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def with_head(content: Mapping[str, Any], tied: bool, tensors: TensorFiles, head: str) -> dict[str, Any]:
    """The config with embeddings tied only where the output matrix is not stored, since what is stored counts."""
    return {**content, "tie_word_embeddings": bool(tied) and head not in tensors.specs}


def open_directory(directory: epath.Path) -> tuple[dict[str, Any], TensorFiles]:
    """(config.json, tensors) of a LLaMA or Vicuna directory. Raises UnusableCheckpoint on another family."""
    content = read_json(directory / "config.json")
    unread.refuse_quantised(content, str(directory))
    if content.get("model_type") != "llama":
        raise UnusableCheckpoint(f"{directory}: model_type is {content.get('model_type')!r}; wanted 'llama'")
    return content, open_tensors(directory)
