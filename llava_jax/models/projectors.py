"""Connectors from vision features to the decoder's width, by name: `linear`, `mlp{n}x_gelu`, `identity`."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.models.layers import Dense


def depth(kind: str) -> int:
    """Number of linear layers of a projector: identity 0, linear 1, mlp{n}x_gelu n.

    Raises:
      ValueError: no such projector.
    """
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(f"unknown projector {kind!r}: there are linear, mlp2x_gelu (any number of layers), identity")
    return int(match[1])


class Projector(nn.Module):
    """Linear layers with exact GELU between them; the names 0, 2, 4 ... are those of the reference's Sequential.

    Both kernel and bias start as U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for nn.Linear, which the
    reference relies on. Source: LLaVA llava/model/multimodal_projector/builder.py.
    """

    kind: str
    features: int
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        for layer in range(depth(self.kind)):
            if layer:
                x = nn.gelu(x, approximate=False)
            init = _uniform(x.shape[-1])
            name = str(2 * layer)
            x = Dense(self.features, True, self.dtype, self.lora_dropout, init, init, name=name)(x)
        return x


def _uniform(fan_in: int) -> Any:
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
