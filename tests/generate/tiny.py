"""A tiny assistant with random weights, in memory and as a checkpoint, for the tests that talk."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from llava_jax import params as names
from llava_jax.checkpoint import model_json
from llava_jax.checkpoint.model_json import Metadata, PromptMetadata
from llava_jax.checkpoint.reader import TensorWriter
from llava_jax.generate.assistant import Assistant
from llava_jax.models import presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format

_TINY = presets.get("tiny")
# One block of each kind: what is compiled here is compiled in a third of the time.
CONFIG = replace(_TINY, vision=replace(_TINY.vision, layers=2), llm=replace(_TINY.llm, layers=1))
WORDS = Path(__file__).parents[1] / "golden" / "tiny_llama.model"


@functools.cache
def weights(config: LlavaConfig = CONFIG) -> Any:
    """Random parameters, large enough that every answer depends on the picture and on each word."""
    rng = np.random.default_rng(0)
    drawn = lambda shape: (0.12 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    flat = {name: 1 + drawn(leaf.shape) if name.endswith("scale") else drawn(leaf.shape)
            for name, leaf in names.flatten(abstract_params(config)).items()}  # fmt: skip
    return jax.tree.map(jax.numpy.asarray, names.unflatten(flat))


def wording(template: templates.Template, added: tuple[str, ...] = ()) -> Format:
    vision = CONFIG.vision
    words = tokenizer.load(WORDS, legacy=False, added=added)
    return Format(template, words, vision.image_size, vision.features, "pad")


def assistant(slots: int = 4) -> Assistant:
    return Assistant(Llava(CONFIG), weights(), wording(templates.get("v1")), slots)


def save(directory: Path, step: int = 3, leaves: Any = None) -> Path:
    """The same assistant as a checkpoint."""
    metadata = Metadata(presets.config_to_json(CONFIG), PromptMetadata("v1", False, "pad", False))
    model_json.write(directory, metadata, wording(templates.get("v1")).tokenizer.files())
    with TensorWriter(directory / str(step) / "params") as writer:
        for name, leaf in names.flatten(weights() if leaves is None else leaves).items():
            writer.write(name, np.asarray(leaf))
    return directory


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3)).astype(np.uint8))


def question(words: str = "What is it?", seed: int = 0) -> Conversation:
    """One question about one picture."""
    return Conversation((Turn("user", f"<image>\n{words}"),), (picture(seed),), id=f"q{seed}")
