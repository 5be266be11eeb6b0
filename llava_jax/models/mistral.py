"""Mistral: LLaMA's decoder with a sliding window, exact as long as no text is longer than the window."""

from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models import llama
from llava_jax.models.decoder import LanguageModel
from llava_jax.models.parts import Content, Decoder, DecoderConfig, check_fixed

# Defaults of transformers' MistralConfig where they are not LLaMA's. Source: transformers 4.57.6 and 5.23.0.
_DEFAULTS = llama.DEFAULTS | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096,
}  # fmt: skip
_FIXED = {"hidden_act": "silu"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """window: tokens that one sees, itself included; None: all. Within it nothing differs from a LLaMA."""

    window: int | None = None

    @property
    def usable_positions(self) -> int:
        return min(super().usable_positions, self.window or self.max_positions)


class Mistral(LanguageModel):
    """Embeddings in, normed hidden states out; rows no longer than the window."""

    config: MistralConfig


def read_config(content: Content, where: str) -> MistralConfig:
    """A decoder's config from config.json or LLaVA's `text_config`.

    Raises:
      UnusableCheckpoint: not a Mistral as `models` has it.
    """
    values = {**_DEFAULTS, **content}
    check_fixed(values, _FIXED, where, "Mistral")
    sizes = llama.read_sizes(values, where)
    window, layers = values["sliding_window"], values["layer_types"]
    if layers not in (None, *([kind] * values["num_hidden_layers"] for kind in _LAYER_TYPES)):
        wish = " or ".join(_LAYER_TYPES)
        raise UnusableCheckpoint(f"{where}: layer_types is {str(layers)[:60]}; wanted {wish} for all layers")
    if window is not None and not (type(window) is int and window > 0):
        raise UnusableCheckpoint(f"{where}: sliding_window is {window!r}; wanted null or a whole number above 0")
    return MistralConfig(**sizes, window=window)


def config_json(config: MistralConfig, vocab: int, dtype: str) -> dict[str, Any]:
    """A decoder's keys of a transformers 4 config, every field written out."""
    own = llama.config_json(config, vocab, dtype) | {"model_type": "mistral", "sliding_window": config.window}
    return {key: value for key, value in own.items() if key not in ("attention_bias", "mlp_bias")}


# Source: config.json of mistralai/Mistral-7B-Instruct-v0.2.
MISTRAL_7B = MistralConfig(
    vocab=32000, width=4096, mlp_width=14336, layers=32, heads=32, kv_heads=8, head_width=128, rope_theta=1000000.0,
    max_positions=32768,
)  # fmt: skip

PART = Decoder(
    kind="mistral", label="a Mistral", config=MistralConfig, module=Mistral, rows=llama.rows, read_config=read_config,
    config_json=config_json, hub_class="MistralForCausalLM", original=("LlavaMistralForCausalLM", "llava_mistral"),
    template="mistral", gguf=llama.GGUF,
)  # fmt: skip
