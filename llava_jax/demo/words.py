"""The base models' tokenizer and texts: a SentencePiece vocabulary of the world's words, and LLaMA's training texts.

The texts describe what a picture would show, so the LLaMA knows the world from text alone.
"""

import numpy as np

from llava_jax.batch import Example
from llava_jax.demo import world
from llava_jax.demo.world import Scene
from llava_jax.prompt import templates
from llava_jax.prompt import tokenizer as tokenizers
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.tokenizer import Tokenizer

VOCABULARY = 512  # 259 ids are LLaMA's own (<unk>, <s>, </s>, 256 bytes); all words of the world fit in the rest
TOKENIZER_SCENES = 300
CAPTION_SHARE = 0.2  # of the texts; the others are dialogues
UNSEEN_SHARE = 0.25  # of the texts are about scenes with a pair that no picture shows, as books know more than eyes


def train_tokenizer(seed: int) -> bytes:
    """The serialized SentencePiece model of the world's words."""
    rng = np.random.default_rng(seed)
    texts = [templates.get("v1").system]
    for _ in range(TOKENIZER_SCENES):
        scene = world.random_scene(rng, "train")
        texts += [world.caption(scene), world.scan(scene)]
        for turn in (world.ask(kind, scene, rng) for kind in world.KINDS):
            texts += [f"USER: {turn.question} ASSISTANT: {turn.answer}", turn.question]
    return tokenizers.train_llama(texts, VOCABULARY)


def text_format(tokenizer: Tokenizer) -> Format:
    """The prompt format of a model that knows no pictures."""
    return Format(templates.get("v1"), tokenizer, image_size=1, image_features=1, image_mode="pad")


def training_text(rng: np.random.Generator, format: Format) -> Example:
    """One text about one scene: a caption twice, or a dialogue, often longer than a row, about a caption."""
    scene = world.random_scene(rng, "unseen" if rng.random() < UNSEEN_SHARE else "train")
    if rng.random() < CAPTION_SHARE:
        return caption_twice(scene, rng, format.tokenizer)
    turns = world.turns(scene, rng) + world.turns(scene, rng)
    # Half the texts leave the system prompt out: it is a quarter of a row and always the same.
    return dialogue(description(scene, rng), turns, format, system=None if rng.random() < 0.5 else "")


def description(scene: Scene, rng: np.random.Generator) -> str:
    """A text with all that the picture shows."""
    return world.scan(scene) if rng.random() < 0.7 else world.caption(scene)


def dialogue(scene_text: str, turns: list[world.Turn], format: Format, system: str | None = None) -> Example:
    """Questions and answers about a scene whose description takes the picture's position."""
    messages = []
    for index, turn in enumerate(turns):
        messages.append(Turn("user", turn.question if index else f"{scene_text}\n{turn.question}"))
        messages.append(Turn("assistant", turn.answer))
    return encode(Conversation(tuple(messages), system=system), format)


def caption_twice(scene: Scene, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
    """A description in some form, then the caption: stage 1's task for a model without a vision tower."""
    first = tokenizer.encode(description(scene, rng), bos=True)
    second = tokenizer.encode(world.caption(scene) + "\n", bos=False)
    supervised = np.arange(len(first) + len(second)) >= len(first)
    return Example(np.array(first + second, np.int32), supervised, (), (), "")
