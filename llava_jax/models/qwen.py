"""Qwen2 and 2.5 (biases of queries, keys and values) and Qwen3 (norms of queries and keys), dense models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax.models import llama
from llava_jax.models.decoder import DecoderBlock, LanguageModel
from llava_jax.models.names import SAME, Row
from llava_jax.models.parts import Content, Decoder, DecoderConfig, GgufDecoder, check_fixed

# Defaults of transformers' Qwen2Config and Qwen3Config where they are not LLaMA's. Source: transformers 4.57.6, 5.23.0.
_DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """A Qwen2 or Qwen2.5 decoder."""


class Qwen2Block(DecoderBlock):
    """LLaMA's block with biases of queries, keys and values."""

    biased: ClassVar[tuple[str, ...]] = ("q", "k", "v")


class Qwen2(LanguageModel):
    """Embeddings in, normed hidden states out."""

    config: Qwen2Config
    block_class: ClassVar[type[DecoderBlock]] = Qwen2Block


def rows2(prefix: str, head: str) -> list[Row]:
    """The table of a Qwen2 whose tensors begin with `prefix` (`model.`) and whose output matrix is `head`."""
    bias = ("llm/blocks/([qkv])/bias", (prefix + r"layers.{layer}.self_attn.\1_proj.bias", SAME))
    return [*llama.rows(prefix, head), bias]


GGUF2 = GgufDecoder("qwen2", [*llama.GGUF_ROWS, ("llm/blocks/([qkv])/bias", (r"blk.{layer}.attn_\1.bias", SAME))])


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """A Qwen3 decoder."""


class Qwen3Block(DecoderBlock):
    """LLaMA's block with norms of each head's queries and keys."""

    normed: ClassVar[tuple[str, ...]] = ("q", "k")


class Qwen3(LanguageModel):
    """Embeddings in, normed hidden states out."""

    config: Qwen3Config
    block_class: ClassVar[type[DecoderBlock]] = Qwen3Block


def rows3(prefix: str, head: str) -> list[Row]:
    """The table of a Qwen3 whose tensors begin with `prefix` (`model.`) and whose output matrix is `head`."""
    norms = ("llm/blocks/([qk])_norm/scale", (prefix + r"layers.{layer}.self_attn.\1_norm.weight", SAME))
    return [*llama.rows(prefix, head), norms]


_GGUF_NORMS = ("llm/blocks/([qk])_norm/scale", (r"blk.{layer}.attn_\1_norm.weight", SAME))
GGUF3 = GgufDecoder("qwen3", [*llama.GGUF_ROWS, _GGUF_NORMS])


def _reader(config: type[DecoderConfig], model: str, own: Content, fixed: Content) -> Callable[..., DecoderConfig]:
    def read_config(content: Content, where: str) -> DecoderConfig:
        """The config of config.json or LLaVA's `text_config`. Raises UnusableCheckpoint where it is another."""
        values = {**_DEFAULTS, **own, **content}
        check_fixed(values, {"hidden_act": "silu", **fixed}, where, model)
        llama.refuse_window(values, where, model)
        return config(**llama.read_sizes(values, where))

    return read_config


def _writer(kind: str, unwritten: Sequence[str]) -> Callable[..., dict[str, Any]]:
    def config_json(config: DecoderConfig, vocab: int, dtype: str) -> dict[str, Any]:
        """A decoder's keys of a transformers 4 config, every field written out."""
        content = llama.config_json(config, vocab, dtype) | {"model_type": kind, "use_sliding_window": False}
        return {key: value for key, value in content.items() if key not in unwritten}

    return config_json


# Source: config.json of Qwen/Qwen2-0.5B-Instruct, Qwen/Qwen2.5-7B-Instruct (Qwen2-7B's sizes) and Qwen/Qwen3-8B.
QWEN2_05B = Qwen2Config(
    vocab=151936, width=896, mlp_width=4864, layers=24, heads=14, kv_heads=2, head_width=64, eps=1e-6,
    rope_theta=1000000.0, max_positions=32768, tie_embeddings=True,
)  # fmt: skip
QWEN25_7B = Qwen2Config(
    vocab=152064, width=3584, mlp_width=18944, layers=28, heads=28, kv_heads=4, head_width=128, eps=1e-6,
    rope_theta=1000000.0, max_positions=32768,
)  # fmt: skip
QWEN3_8B = Qwen3Config(
    vocab=151936, width=4096, mlp_width=12288, layers=36, heads=32, kv_heads=8, head_width=128, eps=1e-6,
    rope_theta=1000000.0, max_positions=40960,
)  # fmt: skip

QWEN2 = Decoder(
    kind="qwen2", label="a Qwen2", config=Qwen2Config, module=Qwen2, rows=rows2,
    read_config=_reader(Qwen2Config, "Qwen2", {}, {}), config_json=_writer("qwen2", ("attention_bias", "mlp_bias")),
    hub_class="Qwen2ForCausalLM", original=("LlavaQwenForCausalLM", "llava_qwen"),
    template="qwen", gguf=GGUF2,
)  # fmt: skip
QWEN3 = Decoder(
    kind="qwen3", label="a Qwen3", config=Qwen3Config, module=Qwen3, rows=rows3,
    read_config=_reader(Qwen3Config, "Qwen3", {"head_dim": 128}, {"attention_bias": False}),
    config_json=_writer("qwen3", ("mlp_bias",)), hub_class="Qwen3ForCausalLM",
    original=("LlavaQwen3ForCausalLM", "llava_qwen3"), template="qwen_3",
    gguf=GGUF3,
)  # fmt: skip
PARTS = (QWEN2, QWEN3)
