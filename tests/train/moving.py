"""A tiny moving world: four frames of a square in one of four places, of which no single one tells what happened.

    Where did it go?     a square moves to a place beside it: left, right, up or down
    Which came first?    a red and a blue square, one after the other, at any place

What changes does so after the first, second or third frame. Who sees one frame, and does not know which, can do no
better than guess: a quarter of the first answers are right, half of the second.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.models import presets
from llava_jax.models.llava import abstract_params
from llava_jax.prompt import tokenizer
from llava_jax.prompt.conversation import Conversation, Turn, Video
from tests.train import tiny

SIDE, CELL, FRAMES = 2, 14, 4  # places a side, pixels of a place
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COLOURS = {"red": (230, 40, 40), "blue": (40, 60, 230)}
WHERE, FIRST = "Where did it go?", "Which came first?"
_TINY = presets.get("tiny")
MODEL = replace(_TINY, image_newline=True, vision=replace(_TINY.vision, patch_size=7, layers=2),
                llm=replace(_TINY.llm, layers=2))  # fmt: skip

CONFIG = """
from llava_jax.config import default

def get_config():
    config = default()
    config.model.update(base={base!r}, dtype="float32", remat="none")
    config.prompt.update(template="mistral", image_mode="anyres", grids="1x1", several="pad", frames={frames})
    config.data.update(batch_samples=32, row_tokens=64, images_per_group=4, threads=2)
    config.train.update(steps={steps}, lr=2e-3, warmup_ratio=0.05, clip_norm=1.0, b2=0.99)
    config.checkpoint.update(every=100000)
    config.log.update(every=50, tensorboard=False)
    config.rates = ((".*", config.train.get_ref("lr")),)
    config.init = ((".*", config.model.get_ref("base")),)
    return config
"""


def _frame(place, colour):
    frame = np.full((SIDE * CELL, SIDE * CELL, 3), 120, np.uint8)
    x, y = place * CELL
    frame[y : y + CELL, x : x + CELL] = COLOURS[colour]
    return Image.fromarray(frame)


def clip(rng, question):
    """(frames, what is right)."""
    place, colours = rng.integers(SIDE, size=2), [list(COLOURS)[i] for i in rng.permutation(2)]
    change = rng.integers(1, FRAMES)
    if question == WHERE:
        way = rng.choice([name for name, step in WAYS.items() if set(place + step) <= set(range(SIDE))])
        before, after, right = _frame(place, colours[0]), _frame(place + WAYS[way], colours[0]), str(way)
    else:
        before, after, right = _frame(place, colours[0]), _frame(place, colours[1]), colours[0]
    return [before] * change + [after] * (FRAMES - change), right


class Clips:
    """Conversations about clips, each of one question; another seed draws others. single: each has one frame."""

    def __init__(self, count, seed, questions=(WHERE, FIRST), single=False):
        self.count, self.seed, self.questions, self.single = count, seed, questions, single
        self.fingerprint = f"{count} {seed} {questions} {single}"

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        question = self.questions[i % len(self.questions)]
        rng = np.random.default_rng([self.seed, i])
        frames, right = clip(rng, question)
        frames = [frames[rng.integers(FRAMES)]] if self.single else frames
        turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", right))
        return Conversation(turns, (Video(frames),), str(i))


def weights(sizes):
    """Random parameters, drawn by numpy: JAX's random numbers compile for many seconds."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(name.endswith("scale"), 0.1, x.shape).astype(np.float32)
             for name, x in params.flatten(abstract_params(sizes)).items()}  # fmt: skip
    return params.unflatten(drawn)


def write(folder: Path, frames: int, steps: int) -> Path:
    """A base of random weights and a config; its path."""
    with reader.TensorWriter(folder / "base" / "0" / reader.PARAMS) as writer:
        for name, x in params.flatten(weights(MODEL)).items():
            writer.write(name, x)
    metadata = model_json.Metadata(presets.config_to_json(MODEL), model_json.PromptMetadata("v1", True, "pad", False))
    model_json.write(folder / "base", metadata, tokenizer.load(tiny.TOKENIZER, legacy=True).files())
    (folder / "config.py").write_text(CONFIG.format(base=str(folder / "base"), frames=frames, steps=steps))
    return folder / "config.py"


def accuracy(assistant, clips) -> dict[str, float]:
    """Of greedy answers, by question."""
    talks = [clips[i] for i in range(len(clips))]
    asked = [replace(talk, turns=talk.turns[:1]) for talk in talks]
    right = [reply.text == talk.turns[1].text for reply, talk in zip(assistant.replies(asked, 4), talks)]
    return {question: float(np.mean(right[i :: len(clips.questions)])) for i, question in enumerate(clips.questions)}
