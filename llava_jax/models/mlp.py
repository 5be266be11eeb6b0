"""Connectors that are layers for each feature: `linear`, `mlp{n}x_gelu`, `identity`, and two that regroup before it.

`concat4_linear` joins each four features that follow each other (MiniGPT-4), `pixel_shuffle{n}_linear` and
`pixel_shuffle{n}_mlp{m}x_gelu` each square of n x n patches (InternVL, SmolVLM).
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.models.layers import Dense
from llava_jax.models.names import Row, linear
from llava_jax.models.parts import Connector, check

CONCATENATED = 4  # features that "concat4_linear" makes one of
_SHUFFLE = r"pixel_shuffle([2-9])_(?=linear$|mlp)"


def layers(projector: str) -> int:
    """Linear layers of a connector's name: mlp{n}x_gelu n, all others 1."""
    match = re.search(r"mlp(\d+)x_gelu$", projector)
    return int(match[1]) if match else 1


class Projector(nn.Module):
    """Linear layers with exact GELU between them; the names 0, 2, 4 ... are those of the reference's Sequential.

    Both kernel and bias start as U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for nn.Linear, which the
    reference relies on. Source: LLaVA llava/model/multimodal_projector/builder.py.
    """

    projector: str
    features: int
    dtype: Any = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        for layer in range(layers(self.projector)):
            if layer:
                x = nn.gelu(x, approximate=False)
            init = _uniform(x.shape[-1])
            name = str(2 * layer)
            x = Dense(self.features, True, self.dtype, self.lora_dropout, init, init, name=name)(x)
        return x


class Identity(Projector):
    """Features as they come, of no parameters."""

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x


def _uniform(fan_in: int) -> Any:
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Concatenated(Projector):
    """Each four features that are neighbours in reading order as one. Source: MiniGPT-4 minigpt_base.py encode_img."""

    @nn.compact
    def __call__(self, x: Float[Array, "Img P C"]) -> Float[Array, "Img N D"]:
        return super().__call__(x.reshape(x.shape[0], -1, CONCATENATED * x.shape[2]))


class PixelShuffled(Projector):
    """Each square of n x n patches as one feature, n * n as wide: rows of the square side by side, then columns.

    Source: transformers modeling_idefics3.py pixel_shuffle; the same order as InternVL's.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "Img P C"]) -> Float[Array, "Img N D"]:
        n, side = shuffled(self.projector), round(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], side // n, n, side // n, n, x.shape[2]).transpose(0, 1, 3, 2, 4, 5)
        return super().__call__(x.reshape(x.shape[0], (side // n) ** 2, -1))


def shuffled(projector: str) -> int:
    """n of the squares of n x n patches of a pixel shuffle."""
    match = re.match(_SHUFFLE, projector)
    assert match is not None, projector
    return int(match[1])


def rows(projector: str, prefix: str) -> list[Row]:
    """The names of the original code, behind `prefix` (`mm_projector.`): one layer is a bare Linear, several are a
    Sequential."""
    return linear(r"projector/(\d+)", prefix[:-1] if layers(projector) == 1 else prefix + r"\1")


def _check_concatenated(config: Any) -> None:
    check(config.vision.features % CONCATENATED == 0, "vision.features", config.vision.features,
          f'a multiple of {CONCATENATED}, with select_feature="patch"')  # fmt: skip


def _check_shuffled(config: Any) -> None:
    n, side = shuffled(config.projector), round(config.vision.patches**0.5)
    check(config.vision.select_feature == "patch", "vision.select_feature", config.vision.select_feature,
          f'"patch" for {config.projector}: a class token has no place in a square')  # fmt: skip
    check(side % n == 0, "vision", f"{side} patches a side", f"a multiple of {n} for {config.projector}")


PLAIN = Connector(
    name=r"linear|mlp[1-9]\d*x_gelu", shown="linear, mlp2x_gelu (any number of layers)", module=Projector, rows=rows,
    features=lambda config: config.vision.features,
    # llama.cpp has a GELU behind the first layer even where no other follows.
    gguf={"mlp2x_gelu": linear("projector/([02])", r"mm.\1")},
)  # fmt: skip
IDENTITY = Connector(
    name="identity", shown="identity", module=Identity, rows=lambda projector, prefix: [],
    features=lambda config: config.vision.features,
)  # fmt: skip
CONCAT4 = Connector(
    name="concat4_linear", shown="concat4_linear", module=Concatenated, rows=rows,
    features=lambda config: config.vision.features // CONCATENATED, check=_check_concatenated,
)  # fmt: skip
PIXEL_SHUFFLE = Connector(
    name=_SHUFFLE + r"(linear|mlp[1-9]\d*x_gelu)", shown="pixel_shuffle2_mlp2x_gelu (any square, any number of layers)",
    module=PixelShuffled, rows=rows, check=_check_shuffled,
    features=lambda config: config.vision.patches // shuffled(config.projector) ** 2,
)  # fmt: skip
PARTS = (PLAIN, IDENTITY, CONCAT4, PIXEL_SHUFFLE)
