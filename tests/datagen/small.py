"""Twenty pictures of the demo world with what is known of them, and a language model that talks about contexts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.demo import world

ROOT = Path(__file__).parents[2]


def write_world(folder: Path, pictures: int = 20) -> Path:
    """Pictures below `folder`, `records.json`, and COCO's captions.json and instances.json of the same."""
    rng = np.random.default_rng(0)
    rows, images, texts, objects, names = [], [], [], [], [str(pair) for pair in world.ALL_PAIRS]
    (folder / "images").mkdir(parents=True)
    half = world.PICTURE_PIXELS // 2
    for number in range(pictures):
        scene, name = world.random_scene(rng, "train"), f"{number:012}.jpg"
        (folder / "images" / name).write_bytes(world.jpeg(scene, rng))
        captions = [f"This is {number}: {world.shuffled_caption(scene, rng)}." for _ in range(3)]
        boxes = [(str(cell), (position % 2, position // 2)) for position, cell in enumerate(scene) if cell]
        shares = [{"category": name, "bbox": [x / 2, y / 2, (x + 1) / 2, (y + 1) / 2]} for name, (x, y) in boxes]
        rows.append({"id": f"{number:012}", "image": name, "captions": captions, "boxes": shares})
        images.append({"id": number, "file_name": name, "width": 2 * half, "height": 2 * half})
        texts += [{"image_id": number, "caption": caption} for caption in captions]
        objects += [{"image_id": number, "category_id": names.index(category), "iscrowd": 0,
                     "bbox": [x * half, y * half, half, half]} for category, (x, y) in boxes]  # fmt: skip
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    for name, content in {
        "records.json": rows,
        "captions.json": {"images": images, "annotations": texts},
        "instances.json": {"images": images, "annotations": objects, "categories": categories},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def context_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def reply(body: dict[str, Any]) -> str:
    """A good answer for the kind that the system message asks for, with the context's first caption in it."""
    system, caption = body["messages"][0]["content"], context_of(body).splitlines()[0]
    if "Near the end" in system:
        return (f"Question:\nWhat is there?\n===\nAnswer:\n{caption}\n===\nQuestion: And in the middle?\n===\n"
                "Answer: Nothing at all.")  # fmt: skip
    if "One question only" in system:
        return f"Question:\nWhy is it so?\n===\nAnswer:\nBecause somebody drew it. {caption}"
    return f"The picture is calm. {caption}"


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "llava_jax.datagen", *map(str, arguments)]


def start(*arguments: Any) -> subprocess.Popen:
    """The command in a process of its own."""
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
