"""The demo's tiny CLIPs: a vision tower and a text encoder, trained to match captions and pictures.

One tower is CLIP's own, one EVA's. The text encoders exist to train them and do not ship. Source: Radford et al. 2021,
section 2.3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from llava_jax.demo import world
from llava_jax.demo.world import Scene
from llava_jax.models import registry
from llava_jax.models.layers import LayerNorm
from llava_jax.models.llama import Llama
from llava_jax.models.presets import EvaConfig, LlamaConfig, TowerConfig, VisionConfig
from llava_jax.prompt.images import open_image, to_pixels
from llava_jax.prompt.tokenizer import Tokenizer

# 16 patches an image: four for each corner of the world.
VISION = VisionConfig(
    image_size=48, patch_size=12, width=128, mlp_width=384, layers=5, heads=4, select_layer=-1,
    select_feature="cls_patch",
)  # fmt: skip
EVA = EvaConfig(image_size=48, patch_size=12, width=128, mlp_width=256, layers=5, heads=4)  # the last is cut off
TEXT = LlamaConfig(
    vocab=512, width=128, mlp_width=256, layers=2, heads=4, kv_heads=4, head_width=32, max_positions=32
)  # fmt: skip
FAMILY = 8  # scenes of a batch that differ from each other in a word or two
MAX_SCALE = 100.0  # CLIP's bound on its inverse temperature


class Pairs(NamedTuple):
    """Pictures and their captions; caption b ends at position `last[b]`."""

    pixels: UInt8[np.ndarray | Array, "B Side Side 3"]
    tokens: Int[np.ndarray | Array, "B T"]
    last: Int[np.ndarray | Array, "B"]


class Album:
    """Families of similar training scenes with their pictures, drawn once."""

    def __init__(self, families: int, rng: np.random.Generator):
        self._scenes = [world.family(rng, FAMILY) for _ in range(families)]
        side = VISION.image_size
        files = [world.jpeg(scene, rng) for family in self._scenes for scene in family]
        pixels = [to_pixels(open_image(file), side, "pad") for file in files]
        self._pixels = np.stack(pixels).reshape(families, FAMILY, side, side, 3)

    def pairs(self, families: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Pairs:
        """All scenes of some families, each with a caption in its usual or in another order."""
        indices = rng.choice(len(self._scenes), size=families, replace=False)
        tokens, last = _tokenize([scene for i in indices for scene in self._scenes[i]], rng, tokenizer)
        return Pairs(self._pixels[indices].reshape(-1, *self._pixels.shape[2:]), tokens, last)


def _tokenize(scenes: list[Scene], rng: np.random.Generator, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(scenes), TEXT.max_positions), np.int32)
    last = np.zeros(len(scenes), np.int32)
    for row, scene in enumerate(scenes):
        text = world.caption(scene) if rng.random() < 0.5 else world.shuffled_caption(scene, rng)
        ids = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
        tokens[row, : len(ids)], last[row] = ids, len(ids) - 1
    return tokens, last


def init(key: Array, vision: TowerConfig) -> dict[str, Any]:
    """Random parameters: `vision` (the tower, named as in a LLaVA), `text`, `joint` (norm, projections and scale)."""
    keys = jax.random.split(key, 4)
    token_ids = jnp.zeros((1, 1), jnp.int32)
    side, width = vision.image_size, vision.width
    tower = _tower(vision).init(keys[0], jnp.zeros((1, side, side, 3), jnp.uint8))["params"]
    norm = {"post_ln": {"scale": jnp.ones(width), "bias": jnp.zeros(width)}}  # a CLIP tower has it among its parameters
    return {
        "vision": tower,
        "text": Llama(TEXT).init(keys[1], jnp.zeros((1, 1, TEXT.width)), token_ids, token_ids)["params"],
        "joint": ({} if "tail" in tower else norm) | {
            "image": jax.random.normal(keys[2], (width, width)) * width**-0.5,
            "text": jax.random.normal(keys[3], (TEXT.width, width)) * TEXT.width**-0.5,
            "log_scale": jnp.log(10.0),
        },
    }


def _tower(vision: TowerConfig) -> Any:
    return registry.tower_of(vision).module(vision)


def loss(params: Any, pairs: Pairs, vision: TowerConfig) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Contrastive loss in both directions, and the share of pictures that find their caption."""
    images = _unit(_image_vectors(params, pairs.pixels, vision))
    texts = _unit(_text_vectors(params, pairs.tokens, pairs.last))
    scale = jnp.minimum(jnp.exp(params["joint"]["log_scale"]), MAX_SCALE)
    logits = scale * images @ texts.T
    losses = [-jnp.diagonal(jax.nn.log_softmax(logits, axis=axis)).mean() for axis in (0, 1)]
    return sum(losses) / 2, (logits.argmax(axis=1) == jnp.arange(len(logits))).mean()


def _image_vectors(params: Any, pixels: UInt8[Array, "B Side Side 3"], vision: TowerConfig) -> Float[Array, "B C"]:
    states = _tower(vision).apply({"params": params["vision"]}, pixels)
    post_ln = params["vision"].get("tail", params["joint"])["post_ln"]
    return LayerNorm(vision.eps).apply({"params": post_ln}, states[:, 0]) @ params["joint"]["image"]


def _text_vectors(params: Any, tokens: Int[Array, "B T"], last: Int[Array, "B"]) -> Float[Array, "B C"]:
    model, variables = Llama(TEXT), {"params": params["text"]}
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.apply(variables, tokens, method="embed")
    hidden = model.apply(variables, x, positions, jnp.ones_like(tokens))
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0] @ params["joint"]["text"]


def _unit(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-8)
