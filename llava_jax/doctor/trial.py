"""A training run of seconds on the mesh that is checked: its checkpoint, records, program and pipeline.

The functions of `train` and `data` do the work, on records of a few words and pictures of one colour.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax import config as configs
from llava_jax import params, sharding
from llava_jax.checkpoint import model_json, reader
from llava_jax.checkpoint.model_json import Metadata, PromptMetadata
from llava_jax.config import Config
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import Source, open_source
from llava_jax.distributed import Rows
from llava_jax.models import presets
from llava_jax.models.llava import abstract_params
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format
from llava_jax.train import program as programs
from llava_jax.train.program import Program

CONFIG = Path(__file__).parent / "tiny.py"
MODEL = presets.get("tiny")
BASE, RECORDS_FILE = "base", "records.json"
RECORDS, PICTURE_PIXELS, LEAST_ROWS = 24, 28, 4
_WORDS = ("red", "green", "blue", "yellow")  # of the demo's tokenizer


class Trial(NamedTuple):
    """A run that is ready to start. args: of the `train` command that would run the same."""

    config: Config
    program: Program
    format: Format
    sources: Sequence[Source]
    args: tuple[str, ...]


def write_files(folder: Path) -> None:
    """Writes a checkpoint, records and their pictures; the same bytes on every process."""
    rng = np.random.default_rng(0)
    # Drawn by numpy: JAX's own first values compile for many seconds.
    with reader.TensorWriter(folder / BASE / "0" / reader.PARAMS) as writer:
        for name, tensor in params.flatten(abstract_params(MODEL)).items():
            mean = 1.0 if name.endswith("scale") else 0.0
            writer.write(name, rng.normal(mean, 0.1, tensor.shape).astype(np.float32))
    text_tokenizer = tokenizer.load(Path(str(resources.files("llava_jax.demo"))) / "assets" / "llama")
    metadata = Metadata(presets.config_to_json(MODEL), PromptMetadata("v1", text_tokenizer.legacy, "square", False))
    model_json.write(folder / BASE, metadata, text_tokenizer.files())
    records = []
    for number in range(RECORDS):
        colour, word = rng.integers(0, 256, 3, dtype=np.uint8), _WORDS[number % len(_WORDS)]
        header = f"P6 {PICTURE_PIXELS} {PICTURE_PIXELS} 255\n".encode()
        (folder / f"{number}.ppm").write_bytes(header + np.tile(colour, (PICTURE_PIXELS, PICTURE_PIXELS, 1)).tobytes())
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"A {word} square, number {number}.")]
        records.append({"id": f"r{number}", "image": f"{number}.ppm",
                        "conversations": [{"from": role, "value": text} for role, text in turns]})  # fmt: skip
    (folder / RECORDS_FILE).write_text(json.dumps(records))


def open_trial(sizes: configs.Mesh, devices: int, platform: str, folder: Path) -> Trial:
    """The run on a mesh of all devices, of what lies in `folder`. Nothing is compiled."""
    rows = devices * math.ceil(LEAST_ROWS / devices)  # any mesh of these devices divides it
    settings = {
        "model.base": str(folder / BASE), "data.sources.0.path": str(folder / RECORDS_FILE),
        "data.sources.0.images": str(folder), "data.batch_samples": str(rows),
        **{f"mesh.{axis}": str(size) for axis, size in vars(sizes).items()},
    }  # fmt: skip
    config = configs.load(CONFIG, settings)
    if platform == "gpu":  # without it, sums of an embedding's gradient are taken in another order each time
        config = dataclasses.replace(config, compiler_options=(("xla_gpu_deterministic_ops", True),))
    text_tokenizer = tokenizer.load(folder / BASE / model_json.TOKENIZER, config.prompt.legacy)
    format = Format(templates.get(config.prompt.template), text_tokenizer, MODEL.vision.image_size,
                    MODEL.image_features, config.prompt.image_mode)  # fmt: skip
    program = programs.build(config, MODEL, config.train.steps or 0, sharding.make_mesh(dataclasses.asdict(sizes)))
    sources = [open_source(source.path, source.images) for source in config.data.sources]
    arguments = ("--config", str(CONFIG), *(f"--config.{key}={value}" for key, value in settings.items()))
    return Trial(config, program, format, sources, arguments)


def open_pipeline(trial: Trial, part: Rows) -> Pipeline:
    """The run's pipeline of these rows of each step, as the trainer makes it."""
    data, train = trial.config.data, trial.config.train
    return Pipeline(
        sources=trial.sources, format=trial.format, batch_samples=data.batch_samples, row_tokens=data.row_tokens,
        images_per_group=data.images_per_group, order=data.order, seed=train.seed, part=part, threads=data.threads,
        group_samples=math.gcd(data.batch_samples, train.group_samples),
    )  # fmt: skip
