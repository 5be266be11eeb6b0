"""A tiny random Idefics resampler with GELU, as OpenFlamingo has it: its names in ours, and what it computes.

All but CONFIG and `inputs` needs torch; `tests/golden/blip2.npz` records what it computes for tests without.
"""

import numpy as np

from llava_jax.models.presets import PerceiverConfig
from tests.models.blip2 import redrawn

WIDTH = 32
CONFIG = PerceiverConfig(latents=3, layers=2, heads=2, head_width=8)
# Theirs, of a layer's two parts -> ours. Written apart from the conversion's tables.
PLACES = {
    "0.context_layer_norm": "ln_media", "0.latents_layer_norm": "ln1", "0.q_proj": "q", "0.k_proj": "k",
    "0.v_proj": "v", "0.output_proj": "o", "1.ln": "ln2", "1.fc": "fc1", "1.c_proj": "fc2",
}  # fmt: skip


def hf_model(config: PerceiverConfig = CONFIG, seed: int = 0):
    """The resampler in float64; the class has ReLU, and OpenFlamingo GELU."""
    import torch
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    sizes = IdeficsConfig(vision_config={"embed_dim": WIDTH})
    model = IdeficsPerceiverResampler(
        sizes, WIDTH, depth=config.layers, n_heads=config.heads, head_dim=config.head_width, n_latents=config.latents
    )
    for _, mlp in model.blocks:
        mlp.act = torch.nn.GELU()
    return redrawn(model, seed)


def to_names(state: dict, config: PerceiverConfig = CONFIG) -> dict[str, np.ndarray]:
    """transformers' names and layouts -> ours, layers stacked. Torch tensors in."""
    left = {name: tensor.detach().float().numpy() for name, tensor in state.items()}
    flat = {"latents": left.pop("latents"), "norm/scale": left.pop("layer_norm.weight"),
            "norm/bias": left.pop("layer_norm.bias")}  # fmt: skip
    for theirs, ours in PLACES.items():
        kinds = {"weight": "scale", "bias": "bias"} if ours.startswith("ln") else {"weight": "kernel"}
        for kind, name in kinds.items():
            layers = [left.pop(f"blocks.{i}.{theirs}.{kind}") for i in range(config.layers)]
            flat[f"blocks/{ours}/{name}"] = np.stack([layer.T for layer in layers])
    assert not left, sorted(left)
    return flat


def inputs(config: PerceiverConfig = CONFIG, seed: int = 1) -> dict[str, np.ndarray]:
    """Seven features of each of two images."""
    return {"features": np.random.default_rng(seed).standard_normal((2, 7, WIDTH)).astype(np.float32)}


def expected(model, batch: dict[str, np.ndarray], config: PerceiverConfig = CONFIG) -> dict[str, np.ndarray]:
    """transformers' latents after the last norm."""
    import torch

    return {"latents": model(torch.tensor(batch["features"]).double()).detach().float().numpy()}
