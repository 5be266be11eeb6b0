"""Records `format1.zip`: checkpoints as llava_jax wrote them before model.json had checksums (format 1).

Run with `python -m tests.golden.make_format1` in a checkout of commit dc57ffb, with this file copied there.

    base/    written leaf by leaf, as `convert` does; every leaf has a CRC-32
    run/     saved by training, not sealed, on top of `base`
    sealed/  saved by training and sealed
"""

import os
import tempfile
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llava_jax.checkpoint import manager, model_json, reader
from llava_jax.models import presets

PATH = Path(__file__).with_name("format1.zip")
PROMPT = model_json.PromptMetadata("v1", False, "pad", False)
WORDS = {"tokenizer.model": b"pieces", "tokenizer_config.json": b"{}"}
BASE = {"llm/norm/scale": np.arange(48, dtype=np.float16), "projector/0/bias": np.zeros(48, np.float16)}
MOVED = {"projector": {"0": {"bias": np.arange(48, dtype=np.float32)}}}
STATE = {"step": np.int32(3), "m": np.ones((2, 3), np.float32)}


def main() -> None:
    model = presets.config_to_json(presets.get("tiny"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with reader.TensorWriter("base/0/params") as writer:
            for name, leaf in BASE.items():
                writer.write(name, leaf)
        model_json.write("base", model_json.Metadata(model, PROMPT), WORDS)
        for name in ("run", "sealed"):
            base = model_json.Base("../base", 0, reader.fingerprint("base"), ("llm/.*",))
            model_json.write(name, model_json.Metadata(model, PROMPT, (base,)), WORDS)
            checkpoints = manager.open_checkpoints(name, 2)
            arrays = {"projector": {"0": {"bias": jnp.asarray(MOVED["projector"]["0"]["bias"])}}}
            state = {key: jnp.asarray(value) for key, value in STATE.items()}
            manager.save(checkpoints, manager.Saved(3, arrays, state, {"seed": 42}))
            if name == "sealed":
                manager.seal(checkpoints)
            manager.close(checkpoints)
        with zipfile.ZipFile(PATH, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(Path().rglob("*")):
                file.write(path)


if __name__ == "__main__":
    main()
