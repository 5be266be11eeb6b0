"""Adapters written from numpy alone: as a LoRA run of ours leaves them, and as peft and the original code do."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.models import lora
from llava_jax.models.llava import Llava
from llava_jax.models.presets import config_from_json
from tests.convert import tiny

RANK, ALPHA = 4, 8
PREFIX = "base_model.model."
NEW, OLD, ORIGINAL = "model.language_model.layers.", "language_model.model.layers.", "model.layers."
LINEARS = {f"self_attn.{n}_proj": (24 if n in "kv" else tiny.WIDTH, tiny.WIDTH) for n in "qkvo"}  # [out, in]
LINEARS |= {f"mlp.{n}_proj": (tiny.MLP, tiny.WIDTH) for n in ("gate", "up")} | {"mlp.down_proj": (tiny.WIDTH, tiny.MLP)}

# A text with one picture of four positions: ids for transformers, which sees <image> there.
IDS = np.array([[1, 5, 9, 960, 960, 960, 960, 17, 300, 44, 7]], np.int32)
PIXELS = np.random.default_rng(5).integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), np.uint8)


def write_run(folder: Path, base: Path, start: str = "", rank: int = RANK, projector: bool = True) -> Path:
    """What a LoRA run on `base` leaves: its own adapters and projector, and scales in `random`, beside the run's steps.

    Args:
      start: the beginning of the kernels that have adapters.
    """
    rng = np.random.default_rng(7)
    shapes = reader.tensor_specs(base)
    kernels = [name for name in lora.targets(shapes) if name.startswith(start)]
    flat = params.flatten(lora.add(params.unflatten(shapes), {name: (rank, ALPHA) for name in kernels}))
    added = {name: struct.shape for name, struct in flat.items() if lora.kernel_of(name)}
    with reader.TensorWriter(folder / "random" / "0" / "params") as writer:
        for name, shape in added.items():
            if name.endswith(lora.SCALE):
                writer.write(name, np.full(shape, ALPHA / rank, np.float32))
    with reader.TensorWriter(folder / "12" / "params") as writer:
        own = {name: shape for name, shape in added.items() if not name.endswith(lora.SCALE)}
        own |= {name: s.shape for name, s in shapes.items() if projector and name.startswith("projector/")}
        for name, shape in own.items():
            writer.write(name, (0.2 * rng.standard_normal(shape)).astype(np.float32))
    bases = tuple(
        model_json.Base(str(place), 0, reader.fingerprint(place), (pattern,))
        for place, pattern in ((folder / "random", ".*/lora_scale"), (base, ".*"))
    )
    of_base = model_json.read(base)
    prompt = model_json.PromptMetadata("llava_v1", of_base.prompt.legacy, "square", False)
    model_json.write(folder, model_json.Metadata(of_base.model, prompt, bases), model_json.read_tokenizer_files(base))
    return folder


def tensors(prefix: str, rank: int = RANK, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of an adapter on every layer of the decoder, with `prefix` before the layer's number."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(tiny.LAYERS):
        for name, (outputs, inputs) in LINEARS.items():
            for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                full = f"{PREFIX}{prefix}{layer}.{name}.lora_{letter}.weight"
                found[full] = (0.2 * rng.standard_normal(shape)).astype(np.float32)
    return found


def write_peft(folder: Path, content: dict[str, np.ndarray], **config: Any) -> Path:
    """A directory as peft writes it."""
    folder.mkdir(parents=True)
    save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(whole | config))
    return folder


def logits(directory: Path, merged: bool = False) -> np.ndarray:
    """Of `IDS` and `PIXELS`, by our own model from a checkpoint's leaves, float32."""
    config = config_from_json(dict(model_json.read(directory).model))
    tree = reader.load_params(directory, dtype=np.float32)
    tree = lora.merge(tree) if merged else tree
    place = np.flatnonzero(IDS[0] == 960)
    slots = np.full(IDS.shape, -1, np.int32)
    slots[0, place] = np.arange(len(place))
    tokens = np.where(slots >= 0, 0, IDS)
    positions, ones = np.arange(IDS.shape[1])[None], np.ones_like(IDS)

    @jax.jit
    def forward(tree: Any) -> Any:
        fields = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, ones, slots)]
        model = Llava(config)
        hidden = model.apply({"params": tree}, *fields, jnp.asarray(PIXELS)[None, None])
        return model.apply({"params": tree}, hidden, method="head")

    return np.asarray(forward(jax.tree.map(jnp.asarray, tree)))[0]
