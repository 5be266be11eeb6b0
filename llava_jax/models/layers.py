"""The pieces that every network here is made of: Dense, norms, rotary positions, and stacks of equal blocks."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax import sharding
from llava_jax.models.parts import DecoderConfig, RopeScaling
from llava_jax.sharding import constrain

Params = Mapping[str, Any]  # nested: a dict, or Flax's frozen one inside a module


def parameter(module: nn.Module, name: str, init: Callable[..., Any], *arguments: Any) -> Any:
    """`module.param`, which traces the initialiser again wherever the parameter is used, to compare shapes: a sixth of
    tracing a step. Checkpoints are compared as a whole (`reader.check_specs`)."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, *arguments)


class Dense(nn.Module):
    """x @ kernel (+ bias) in `dtype`; parameters keep their own dtype and are cast where they are used.

    What lies beside the kernel is taken too (`models.lora`): scales of an int8 kernel's columns, an adapter. An
    adapter's input loses the share `dropout` where there is a "dropout" rng, that is in training.

    rows: names of the input's leading dimensions, where the kernel's gradient is to be summed over them as
      `sharding.product_sum` does; () leaves that to XLA.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    dropout: float = 0.0
    kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)
    bias_init: Callable[..., Array] = nn.initializers.zeros
    rows: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "... In"]) -> Float[Array, "... Out"]:
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        x, place = x.astype(self.dtype), f"/{self.name}/kernel"
        if sharding.reduces(place, kernel.shape, x, *self.rows):
            y = _product(place, self.rows, x, kernel.astype(self.dtype))
        else:
            y = _rows_product(x, kernel.astype(self.dtype))
        if self.has_variable("params", "kernel_scale"):
            # After the product: bfloat16 holds every int8 exactly, but not the weights that they stand for.
            y = (y * self.get_variable("params", "kernel_scale")).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            y = y + self._adapter(x)
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, (self.features,))
            y = y + bias.astype(self.dtype)
        return y

    def _adapter(self, x: Float[Array, "... In"]) -> Float[Array, "... Out"]:
        a, b, scale = (self.get_variable("params", name) for name in ("lora_a", "lora_b", "lora_scale"))
        if self.dropout and self.has_rng("dropout"):
            # 16 random bits a value are enough to tell 0.05 from 0.050001 and half of bernoulli's work.
            kept = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint16) >= round(self.dropout * 2**16)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(self.dtype)
        narrow = (x @ a.astype(self.dtype)) * scale  # scaled where it is narrowest, in float32
        return narrow.astype(self.dtype) @ b.astype(self.dtype)


def _rows_product(x: Array, kernel: Any) -> Array:
    """x [..., In] @ kernel [In, Out]. For a CPU `x` is one matrix: the kernel's gradient is a sum over one dimension.

    A sum over two makes XLA copy both factors: forward and backward of 1,024 tokens through an mlp of 128 and 320 take
    13.9 ms with it and 8.7 without (EPYC, float32, jax 0.10.2, 2026-11-30).
    """
    if not sharding.one_cpu():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(place: str, rows: tuple[str, ...], x: Array, kernel: Array) -> Array:
    """x @ kernel, whose gradient along the kernel is reduced once, to the part that each device holds."""
    return x @ kernel


def _product_forward(place: str, rows: tuple[str, ...], x: Any, kernel: Any) -> tuple[Array, Any]:
    return x.value @ kernel.value, (kernel.value, x.value if kernel.perturbed else None)


def _product_backward(place: str, rows: tuple[str, ...], kept: Any, slope: Array) -> tuple[Array, Array | None]:
    kernel, x = kept
    return slope @ kernel.T, None if x is None else sharding.product_sum(place, x, slope, *rows)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class RMSNorm(nn.Module):
    """LLaMA's norm: the mean square in float32, the result cast to `dtype` before the scale, as transformers does."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """CLIP's norm: mean and variance in float32, the result in `dtype`."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(self.dtype)


def rotary(
    positions: Int[Array, "B T"], config: DecoderConfig
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of every position's rotation, float32, for each of the H/2 pairs.

    "dynamic" scaling grows with the row's own last position, so a row's result never depends on its neighbours
    (Differs from transformers, which takes the longest row of the batch; equal at batch 1). Keys in a cache keep
    the rotation of the moment they were written, as there.
    """
    half = jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width
    theta = jnp.float32(config.rope_theta)
    place = positions.astype(jnp.float32)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        place = place / scaling.factor
    if scaling is not None and scaling.kind == "dynamic":
        length = jnp.maximum(positions.max(axis=1) + 1, config.max_positions).astype(jnp.float32)
        growth = scaling.factor * length / config.max_positions - (scaling.factor - 1)
        theta = (theta * growth ** (config.head_width / (config.head_width - 2)))[:, None, None]
    angles = place[..., None] / theta**half
    if scaling is not None and scaling.kind == "llama3":
        angles = place[..., None] * _slowed(1 / theta**half, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def _slowed(frequencies: Float[Array, "H2"], scaling: RopeScaling) -> Float[Array, "H2"]:
    """LLaMA 3.1's: slow rotations are divided by `factor`, fast ones stay, those between are a mixture of both."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the positions of the first training
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), transformers' half layout, in float32."""
    # Halves change places before x is widened: a float32 copy of each half is memory that a TPU's step is short of.
    other = jnp.roll(x, x.shape[-1] // 2, axis=-1).astype(jnp.float32)
    cos, sin = jnp.concatenate([cos, cos], axis=-1)[:, :, None], jnp.concatenate([-sin, sin], axis=-1)[:, :, None]
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def stacked(parent: nn.Module, name: str, block: nn.Module, layers: int, *example: Any) -> Params:
    """Parameters of `layers` equal blocks under one name, each leaf with a leading axis L.

    Kept as one pytree (not through `nn.scan`) so that the same stack can be scanned in training and unrolled in
    decoding, and so that a leaf added to it (an adapter) is found by the block itself.
    `block` must be unbound (`parent=None`); `example` is what its `init` is called with.
    """

    def init(key: Array) -> Params:
        return jax.lax.map(lambda k: block.init(k, *example)["params"], jax.random.split(key, layers))

    return parameter(parent, name, init)


def through(
    parent: nn.Module, block: nn.Module, stack: Params, layers: int, x: Float[Array, "Img P C"], *others: Any,
    every: bool = False, wrap: Callable[..., Any] = lambda body: body,
) -> list[Float[Array, "Img P C"]]:  # fmt: skip
    """`x` through the blocks of a stack, one after another: [x, after the first, ...], or (not `every`) the last only.

    others: what each block is called with besides. wrap: of the scanned body (`models.remat`). Each layer has its own
      key where `parent` has a "dropout" rng. While parameters are made `x` is enough: its shape is that of the result.
    """
    if parent.is_initializing():
        return [x]
    keys = jax.random.split(parent.make_rng("dropout"), layers) if parent.has_rng("dropout") else None

    def body(x: Array, layer: tuple[Params, Array | None]) -> tuple[Array, Array | None]:
        weights, key = layer
        y = block.apply({"params": weights}, x, *others, rngs={} if key is None else {"dropout": key})
        y = constrain(y, "images")
        return y, y if every else None

    last, states = jax.lax.scan(wrap(body), x, (stack, keys))
    return [x, *states] if every else [last]


@jax.custom_vjp
def read_layer(stack: Params, index: Int[Array, ""], own: Params) -> Params:
    """Layer `index` of a stack, for a scan over some of its layers; the gradient is that of `own`, its slice.

    The slices of a scan would be a second copy of the parameters. `own` is never read, so that XLA makes none of it.
    """
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


read_layer.defvjp(lambda *arguments: (read_layer(*arguments), None), lambda _, slope: (None, None, slope))


def take_layer(stack: Params, index: int) -> Params:
    """One block's parameters out of a stack; each leaf is an array [L, ...], or a tuple of its L parts."""
    return jax.tree.map(lambda leaf: leaf[index], stack, is_leaf=lambda leaf: isinstance(leaf, tuple))
