"""Vision transformers: what CLIP's, SigLIP's and EVA's have in common. Source: openai/CLIP; LLaVA's clip_encoder.py."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from llava_jax.errors import UnusableCheckpoint
from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense, LayerNorm, Params, parameter, stacked, through
from llava_jax.models.names import PATCH, SAME, Row, linear, norm
from llava_jax.models.parts import Content, TowerConfig, check, check_choice, check_numbers
from llava_jax.models.remat import remat

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
}


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """A tower whose features are one of its hidden states; names as in transformers' CLIPVisionConfig.

    select_layer: index into the hidden states (0 is the first block's input, k the output of block k, negative from
      the end); blocks after it never run. LLaVA takes -2, without the norm after the last block.
    """

    act: str = "quick_gelu"
    select_layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.act in ACTIVATIONS, "act", self.act, " or ".join(ACTIVATIONS))
        check(-self.layers - 1 <= self.select_layer <= self.layers, "select_layer", self.select_layer,
              f"between {-self.layers - 1} and {self.layers}")  # fmt: skip

    @property
    def run_layers(self) -> int:
        """Blocks that run to reach `select_layer`; the others are kept in `vision/tail`."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


class VisionBlock(nn.Module):
    """Pre-norm transformer block with biases; every patch sees every patch."""

    config: VisionConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "Img P C"]) -> Float[Array, "Img P C"]:
        config = self.config
        heads = (*x.shape[:2], config.heads, config.width // config.heads)
        y = LayerNorm(config.eps, self.dtype, name="ln1")(x)
        q, k, v = (self._dense(name, config.width)(y).reshape(heads) for name in ("q", "k", "v"))
        y = attention(q, k, v, rows="images").reshape(x.shape)
        x = x + self._dense("o", config.width)(y)
        y = LayerNorm(config.eps, self.dtype, name="ln2")(x)
        y = ACTIVATIONS[config.act](self._dense("fc1", config.mlp_width)(y))
        return x + self._dense("fc2", config.width)(y)

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, True, self.dtype, self.lora_dropout, name=name)


class VisionTransformer(nn.Module):
    """What all towers here share: patches with positions, and a class token, through a stack of blocks.

    Their `setup` calls `embeddings`, and makes `block` and `blocks`.
    """

    config: TowerConfig
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0
    remat: str = "none"  # of a block's backward pass, where the tower is trained
    class_token: ClassVar[bool] = True
    patch_bias: ClassVar[bool] = False

    def embeddings(self) -> None:
        """Makes `cls`, `pos` and `patch`, a kernel and maybe a bias."""
        config, normal = self.config, nn.initializers.normal(0.02)
        if self.class_token:
            self.cls = parameter(self, "cls", normal, (config.width,))
        self.pos = parameter(self, "pos", normal, (config.patches + self.class_token, config.width))
        self.patch = parameter(self, "patch", self._init_patch, normal)

    def _init_patch(self, key: Array, init: Any) -> dict[str, Array]:
        size, width = self.config.patch_size, self.config.width
        bias = {"bias": jnp.zeros(width)} if self.patch_bias else {}
        return {"kernel": init(key, (size, size, 3, width))} | bias

    def __call__(self, pixels: UInt8[Array, "Img Side Side 3"]) -> Float[Array, "Img P C"]:
        """uint8 pictures -> features: [.., patches, C], with the class token first for "cls_patch"."""
        states = self.hidden_states(pixels, every=False)
        dropped = self.class_token and self.config.select_feature == "patch"
        return states[-1][:, 1:] if dropped else states[-1]

    def hidden_states(self, pixels: UInt8[Array, "Img Side Side 3"], every: bool = True) -> list[Array]:
        """Hidden states [Img, P, C]: before the first block and after each that runs (or the last only)."""
        x = self._embed(normalise(pixels, self.config).astype(self.dtype))
        return through(self, self.block, self.blocks, self.config.run_layers, x, every=every, wrap=remat(self.remat))

    def _embed(self, x: Float[Array, "Img Side Side 3"]) -> Float[Array, "Img P C"]:
        x = _flat_patches(x, self.config.patch_size)
        x = x @ self.patch["kernel"].reshape(-1, self.config.width).astype(self.dtype)
        if self.patch_bias:
            x = x + self.patch["bias"].astype(self.dtype)
        if self.class_token:
            cls = jnp.broadcast_to(self.cls.astype(self.dtype), (x.shape[0], 1, self.config.width))
            x = jnp.concatenate([cls, x], axis=1)
        return x + self.pos.astype(self.dtype)


class HiddenStateTower(VisionTransformer):
    """A tower up to the hidden state `select_layer`; `vision/tail` holds what its files have after it, never run."""

    config: VisionConfig

    def setup(self) -> None:
        config = self.config
        self.embeddings()
        self.block = VisionBlock(config, self.dtype, self.lora_dropout, parent=None)
        example = jnp.zeros((1, 1, config.width), self.dtype)
        self.blocks = stacked(self, "blocks", self.block, config.run_layers, example)
        if self.is_initializing():
            self.param("tail", self.init_tail, example)

    def init_tail(self, key: Array, example: Array) -> Params:
        """Parameters after the selected hidden state: the blocks that do not run, and the norm after them."""
        after = self.config.layers - self.config.run_layers
        tail: dict[str, Any] = {
            "post_ln": {"scale": jnp.ones(self.config.width), "bias": jnp.zeros(self.config.width)}
        }
        if after:
            keys = jax.random.split(key, after)
            tail["blocks"] = jax.lax.map(lambda k: self.block.init(k, example)["params"], keys)
        return tail


def rows(prefix: str) -> list[Row]:
    """The names of transformers for what CLIP and SigLIP share, behind `prefix` (`vision_model.`)."""
    blocks, layer = "vision/(?:tail/)?blocks", prefix + "encoder.layers.{layer}."
    return [
        ("vision/patch/kernel", (prefix + "embeddings.patch_embedding.weight", PATCH)),
        ("vision/pos", (prefix + "embeddings.position_embedding.weight", SAME)),
        *norm("vision/tail/post_ln", prefix + "post_layernorm"),
        *norm(f"{blocks}/ln([12])", layer + r"layer_norm\1"),
        *linear(f"{blocks}/([qkv])", layer + r"self_attn.\1_proj"),
        *linear(f"{blocks}/o", layer + "self_attn.out_proj"),
        *linear(f"{blocks}/(fc[12])", layer + r"mlp.\1"),
    ]


# Source: llama.cpp tools/mtmd/clip-impl.h (TN_*).
GGUF_ROWS: list[Row] = [
    ("vision/patch/kernel", ("v.patch_embd.weight", PATCH)),
    ("vision/pos", ("v.position_embd.weight", SAME)),
    *norm("vision/blocks/ln([12])", r"v.blk.{layer}.ln\1"),
    *linear("vision/blocks/([qkv])", r"v.blk.{layer}.attn_\1"),
    *linear("vision/blocks/o", "v.blk.{layer}.attn_out"),
    *linear("vision/blocks/fc1", "v.blk.{layer}.ffn_up"),
    *linear("vision/blocks/fc2", "v.blk.{layer}.ffn_down"),
]


def first_layers(config: VisionConfig) -> dict[str, int]:
    """Where `vision/tail` begins in the numbering of their layers."""
    return {"vision/tail/": config.run_layers}


# What every tower's config.json has.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def check_json(values: Content, where: str, select_layer: int = -1) -> None:
    """Raises UnusableCheckpoint unless a config.json, filled with its kind's defaults, is of a tower that runs here."""
    check_numbers(values, SIZES, "layer_norm_eps", where)
    check_choice(values, "num_channels", (3,), where)
    check_choice(values, "hidden_act", ACTIVATIONS, where)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UnusableCheckpoint(f"{where}: hidden_size is {width}; wanted a multiple of num_attention_heads={heads}")
    layers = values["num_hidden_layers"]
    if not 1 <= (select_layer if select_layer >= 0 else layers + 1 + select_layer) <= layers:
        raise UnusableCheckpoint(
            f"{where}: hidden state {select_layer} is wanted of {layers} layers; wanted one after a block: "
            f"1 to {layers}, or -{layers} to -1"
        )


def sizes_of(values: Any) -> dict[str, Any]:
    """The fields of a TowerConfig out of a config.json whose numbers are checked."""
    return {
        "image_size": values["image_size"], "patch_size": values["patch_size"], "width": values["hidden_size"],
        "mlp_width": values["intermediate_size"], "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"], "eps": float(values["layer_norm_eps"]),
    }  # fmt: skip


def sizes_json(config: TowerConfig) -> dict[str, Any]:
    """The inverse of `sizes_of`."""
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.eps,
        "attention_dropout": 0.0,
    }


def _flat_patches(x: Float[Array, "Img Side Side 3"], size: int) -> Float[Array, "Img P Patch"]:
    """Each patch as a row, in reading order, flattened as (row, column, channel).

    A convolution with a stride of its own size is a product with these.
    """
    images, side = x.shape[0], x.shape[1] // size
    x = x[:, : side * size, : side * size].reshape(images, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, side * side, size * size * 3)


def normalise(pixels: UInt8[Array, "*Img Side Side 3"], config: TowerConfig) -> Float[Array, "*Img Side Side 3"]:
    """(pixels / 255 - mean) / std in float32, on the device, so that the host sends a quarter of the bytes."""
    scaled = pixels.astype(jnp.float32) * jnp.float32(1 / 255)
    return (scaled - jnp.asarray(config.mean, jnp.float32)) / jnp.asarray(config.std, jnp.float32)
