"""The world on disk: JPEG files, captions and instructions as LLaVA JSON, and the test sets' questions."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax.demo import world
from llava_jax.demo.world import Question, Scene

PRETRAIN, FINETUNE, FINETUNE_BLIND = "pretrain.json", "finetune.json", "finetune_blind.json"
BLANK = "blank.jpg"  # the picture in every record of a blind model
DIALOGUES = 2  # about each training picture


class Sizes(NamedTuple):
    """How many pictures, and how many questions of each kind, a world has."""

    train: int
    heldout: int
    unseen: int
    heldout_per_kind: int
    unseen_per_kind: int


SIZES = Sizes(train=3000, heldout=400, unseen=200, heldout_per_kind=100, unseen_per_kind=50)


class TestSet(NamedTuple):
    """Questions about pictures that no training record shows. pictures: paths relative to the world's folder."""

    pictures: tuple[str, ...]
    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]


def write(directory: Path, seed: int, sizes: Sizes = SIZES, wide: int = 1) -> dict[str, TestSet]:
    """Draws a world into `directory`: three JSON files, their pictures, and the test sets "heldout" and "unseen".

    wide: how many times as wide as high the pictures of dialogues and questions are; captions are about square ones.
    """
    rng = np.random.default_rng([seed, 3])
    scenes = [world.random_scene(rng, "train") for _ in range(sizes.train)]
    pictures = _draw(directory, "train", scenes, rng)
    (directory / BLANK).write_bytes(world.blank_jpeg())
    captions = [_record(picture, [("<image>", world.caption(scene))]) for picture, scene in zip(pictures, scenes)]
    _write_json(directory / PRETRAIN, captions)
    pictures = pictures if wide == 1 else _draw(directory, "wide", scenes, rng, wide)
    dialogues = []
    for number in range(DIALOGUES):
        for picture, scene in zip(pictures, scenes):
            turns = [(turn.question, turn.answer) for turn in world.turns(scene, rng)]
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
            dialogues.append(_record(picture, turns, f"-{number}"))
    _write_json(directory / FINETUNE, dialogues)
    _write_json(directory / FINETUNE_BLIND, [{**record, "image": BLANK} for record in dialogues])
    return {
        "heldout": _test_set(directory, "heldout", sizes.heldout, sizes.heldout_per_kind, rng, wide),
        "unseen": _test_set(directory, "unseen", sizes.unseen, sizes.unseen_per_kind, rng, wide),
    }


def _test_set(
    directory: Path, part: str, pictures: int, per_kind: int, rng: np.random.Generator, wide: int
) -> TestSet:
    scenes = [world.random_scene(rng, part) for _ in range(pictures)]
    questions = world.balanced_questions(scenes, per_kind, rng)
    return TestSet(tuple(_draw(directory, part, scenes, rng, wide)), tuple(scenes), tuple(questions))


def _draw(directory: Path, part: str, scenes: list[Scene], rng: np.random.Generator, wide: int = 1) -> list[str]:
    """Writes the pictures of some scenes; their paths relative to `directory`."""
    (directory / part).mkdir(parents=True)
    names = [f"{part}/{number:05}.jpg" for number in range(len(scenes))]
    for name, scene in zip(names, scenes):
        (directory / name).write_bytes(world.jpeg(scene, rng, wide))
    return names


def _record(picture: str, turns: list[tuple[str, str]], suffix: str = "") -> dict[str, Any]:
    messages = [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn)]
    return {"id": f"{Path(picture).stem}{suffix}", "image": picture, "conversations": messages}


def _write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n")
