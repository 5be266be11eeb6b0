"""The pieces that every network here is made of: Dense, norms, rotary positions, and stacks of equal blocks."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.models.presets import LlamaConfig

Params = Mapping[str, Any]  # nested: a dict, or Flax's frozen one inside a module


class Dense(nn.Module):
    """x @ kernel (+ bias) in `dtype`; parameters keep their own dtype and are cast where they are used."""

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.normal(0.02)
    bias_init: Callable[..., Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "... In"]) -> Float[Array, "... Out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """LLaMA's norm: the mean square in float32, the result cast to `dtype` before the scale, as transformers does."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """CLIP's norm: mean and variance in float32, the result in `dtype`."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(self.dtype)


def rotary(positions: Int[Array, "B T"], config: LlamaConfig) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
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
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), transformers' half layout, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def stacked(parent: nn.Module, name: str, block: nn.Module, layers: int, *example: Any) -> Params:
    """Parameters of `layers` equal blocks under one name, each leaf with a leading axis L.

    Kept as one pytree (not through `nn.scan`) so that the same stack can be scanned in training and unrolled in
    decoding, and so that a leaf added to it (an adapter) is found by the block itself.
    `block` must be unbound (`parent=None`); `example` is what its `init` is called with.
    """

    def init(key: Array) -> Params:
        return jax.vmap(lambda k: block.init(k, *example)["params"])(jax.random.split(key, layers))

    if parent.is_initializing():
        return parent.param(name, init)
    return parent.get_variable("params", name)


def take_layer(stack: Params, index: int) -> Params:
    """One block's parameters out of a stack; each leaf is an array [L, ...], or a tuple of its L parts."""
    return jax.tree.map(lambda leaf: leaf[index], stack, is_leaf=lambda leaf: isinstance(leaf, tuple))


REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda body: body,
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),  # inside a scan nothing can be merged anyway
}


def remat(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The wrapper of a scanned block for a rematerialisation policy.

    Raises:
      ValueError: no such policy.
    """
    if name not in REMAT:
        raise ValueError(f"unknown remat policy {name!r}: there are {', '.join(REMAT)}")
    return REMAT[name]
