"""A run small enough for a test: ten coloured pictures, a tiny model, and the config file that trains it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.checkpoint.model_json import Metadata, PromptMetadata
from llava_jax.models import presets
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig
from llava_jax.prompt import tokenizer
from tests.golden.make_models import inputs

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = ROOT / "tests" / "golden" / "tiny_llama.model"

MODEL = LlavaConfig(
    VisionConfig(image_size=14, patch_size=7, width=16, mlp_width=24, layers=2, heads=2), "mlp2x_gelu",
    LlamaConfig(vocab=960, width=24, mlp_width=32, layers=2, heads=2, kv_heads=1, head_width=12, max_positions=256),
)  # fmt: skip

CONFIG = """
from llava_jax.config import Source, default

def get_config():
    config = default()
    config.model.update(base={base!r}, dtype="float32", remat="none")
    config.prompt.update(template="v1", image_mode="square")
    config.data.update(sources=(Source({records!r}, {images!r}),), validation=(Source({records!r}, {images!r}),),
                       batch_samples=4, row_tokens=96, threads=2)
    config.train.update(steps=12, lr=1e-2, warmup_ratio=0.1)
    config.checkpoint.update(every=3, keep=2)
    config.log.update(every=4, tensorboard=False)
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = ((".*", config.model.get_ref("base")),)
    return config
"""

# Appended to a config file: the process gets SIGTERM when it reports its fifth update.
TERMINATED = """
import os
import signal
from llava_jax.train import loop

report = loop._report

def terminated(*args):
    if args[-1].step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return report(*args)

loop._report = terminated
"""


def write_base(folder: Path, seed: int = 0) -> None:
    """A whole checkpoint of the preset "tiny", drawn by numpy: JAX's random numbers compile for many seconds."""
    rng = np.random.default_rng(seed)
    model = presets.get("tiny")
    with reader.TensorWriter(folder / "0" / reader.PARAMS) as writer:
        for name, leaf in params.flatten(abstract_params(model)).items():
            writer.write(name, rng.normal(1.0 if name.endswith("scale") else 0.0, 0.1, leaf.shape).astype(np.float32))
    metadata = Metadata(presets.config_to_json(model), PromptMetadata("v1", True, "square", False))
    model_json.write(folder, metadata, tokenizer.load(TOKENIZER, legacy=True).files())


def write_run(folder: Path) -> Path:
    """A base checkpoint, records, pictures and `config.py` in a folder; the path of the config."""
    from PIL import Image

    write_base(folder / "base")
    rng = np.random.default_rng(0)
    records = []
    (folder / "images").mkdir()
    for i in range(10):
        color = rng.integers(0, 256, 3, dtype=np.uint8)
        Image.fromarray(np.tile(color, (28, 28, 1))).save(folder / "images" / f"{i}.jpg")
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"A square of {int(color.sum())}.")]
        records.append({"id": f"r{i}", "image": f"{i}.jpg",
                        "conversations": [{"from": role, "value": text} for role, text in turns]})  # fmt: skip
    (folder / "records.json").write_text(json.dumps(records))
    places = {"base": folder / "base", "records": folder / "records.json", "images": folder / "images"}
    (folder / "config.py").write_text(CONFIG.format(**{name: str(path) for name, path in places.items()}))
    return folder / "config.py"


def batch(rows: int = 4, tokens: int = 24, seed: int = 1) -> dict[str, np.ndarray]:
    """Fields of a batch for `MODEL`."""
    return inputs(MODEL, rows=rows, tokens=tokens, seed=seed)


def start(config: Path, workdir: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "llava_jax.train", "--config", str(config), "--workdir", str(workdir), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
