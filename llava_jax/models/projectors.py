"""Connectors from vision features to the decoder's width, by name.

`linear`, `mlp{n}x_gelu` and `identity` are layers for each feature. `qformer`, `perceiver` and `concat4_linear` first
make fewer features of an image (`resampler_of`, `concatenated`) and end in one linear layer; `flamingo_xattn` keeps
the perceiver's features as they are, for blocks in the decoder to look at.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.errors import UsageError
from llava_jax.models.flamingo import Perceiver
from llava_jax.models.layers import Dense
from llava_jax.models.presets import CONCATENATED, LlavaConfig, QFormerConfig
from llava_jax.models.qformer import QFormer

_LAYERS = {"identity": 0, "flamingo_xattn": 0, "linear": 1, "qformer": 1, "perceiver": 1, "concat4_linear": 1}


def depth(kind: str) -> int:
    """Number of linear layers of a connector: identity and flamingo_xattn 0, mlp{n}x_gelu n, all others 1.

    Raises:
      ValueError: no such projector.
    """
    if kind in _LAYERS:
        return _LAYERS[kind]
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        others = ", ".join(name for name in _LAYERS if name != "linear")
        raise UsageError(f"unknown projector {kind!r}: there are linear, mlp2x_gelu (any number of layers), {others}")
    return int(match[1])


def input_width(config: LlavaConfig) -> int:
    """Width of what the first linear layer reads."""
    if isinstance(config.resampler, QFormerConfig):
        return config.resampler.width
    return config.vision.width * (CONCATENATED if config.projector == "concat4_linear" else 1)


def resampler_of(config: LlavaConfig, dtype: Any, lora_dropout: float) -> nn.Module | None:
    """What makes fewer features of an image's, if the connector has such a part."""
    if config.resampler is None:
        return None
    kind = QFormer if isinstance(config.resampler, QFormerConfig) else Perceiver
    return kind(config.resampler, dtype, lora_dropout)


def concatenated(x: Float[Array, "Img P C"]) -> Float[Array, "Img Fewer Wide"]:
    """Each four features that are neighbours in reading order as one. Source: MiniGPT-4 minigpt_base.py encode_img."""
    return x.reshape(x.shape[0], -1, CONCATENATED * x.shape[2])


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
