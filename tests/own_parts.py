"""A tower, a connector and a decoder of a user's own; `LLAVA_JAX_PARTS=tests.own_parts` adds them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from llava_jax.models import llama, vit
from llava_jax.models.decoder import DecoderBlock, LanguageModel
from llava_jax.models.layers import Dense, RMSNorm
from llava_jax.models.names import LINEAR, SAME, linear
from llava_jax.models.parts import Connector, Decoder, DecoderConfig, Tower, TowerConfig
from llava_jax.models.registry import register


@dataclass(frozen=True)
class PatchConfig(TowerConfig):
    """A tower of one layer: each patch by itself."""


class PatchTower(nn.Module):
    """Pixels -> GELU of a linear layer of each patch."""

    config: PatchConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels):
        x = vit.normalise(pixels, self.config).astype(self.dtype)
        size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        x = x.reshape(len(x), side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), side * side, -1)
        return nn.gelu(Dense(self.config.width, True, self.dtype, self.lora_dropout, name="fc")(x))


def read_tower(content, where, select_layer, select_feature):
    return PatchConfig(**vit.sizes_of(content), select_feature=select_feature)


class Gated(nn.Module):
    """Features -> gate(x) * up(x)."""

    projector: str
    features: int
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        gate, up = (Dense(self.features, True, self.dtype, self.lora_dropout, name=name)(x) for name in ("gate", "up"))
        return nn.silu(gate) * up


@dataclass(frozen=True)
class ParallelConfig(DecoderConfig):
    """A decoder whose attention and mlp read the same norm."""


class ParallelBlock(DecoderBlock):
    @nn.compact
    def __call__(self, x, rotation, segments=None, slots=None, cache=None):
        y = RMSNorm(self.config.eps, self.dtype, name="ln1")(x)
        seen, kept = self.attend(y, rotation, segments, slots, cache)
        return x + seen + self.feed(y), kept


class Parallel(LanguageModel):
    config: ParallelConfig
    block_class: ClassVar[type[DecoderBlock]] = ParallelBlock


def decoder_rows(prefix, head):
    layer = prefix + "h.{layer}."
    return [
        ("llm/embed/table", (prefix + "wte.weight", SAME)),
        ("llm/blocks/ln1/scale", (layer + "ln.weight", SAME)),
        ("llm/blocks/([qkvo]|gate|up|down)/kernel", (layer + r"\1.weight", LINEAR)),
        ("llm/norm/scale", (prefix + "ln_f.weight", SAME)),
        ("llm/head/kernel", (head, LINEAR)),
    ]


def read_decoder(content, where):
    return ParallelConfig(**llama.read_sizes({**llama.DEFAULTS, **content}, where))


register(Tower(
    kind="patch", label="a patch", config=PatchConfig, module=PatchTower, model_types=("patch",), mark="fc.weight",
    class_token=False, rows=lambda prefix: linear("vision/fc", prefix + "fc"), read_config=read_tower,
    config_json=lambda config: {"model_type": "patch", **vit.sizes_json(config)},
))  # fmt: skip
register(Connector(
    name="gated", shown="gated", module=Gated, features=lambda config: config.vision.features,
    rows=lambda projector, prefix: linear("projector/(gate|up)", prefix + r"\1"),
))  # fmt: skip
register(Decoder(
    kind="parallel", label="a Parallel", config=ParallelConfig, module=Parallel, rows=decoder_rows,
    read_config=read_decoder, hub_class="ParallelForCausalLM", original=("LlavaParallelForCausalLM", "llava_parallel"),
    config_json=lambda *args: llama.config_json(*args) | {"model_type": "parallel"}, template="v1",
))  # fmt: skip
