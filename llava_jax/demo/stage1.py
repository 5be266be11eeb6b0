"""Config of the demo's stage 1: captions; only the projector is trained. The demo fills in paths (see `story.py`)."""

from typing import Any

from llava_jax.config import Source, default


def get_config() -> Any:
    """LLaVA's stage 1 (configs/llava15_7b_pretrain.py) sized for a model of a million parameters."""
    config = default()
    config.model.update(dtype="float32", remat="none")
    config.prompt.update(template="plain", image_mode="pad")
    config.data.update(sources=(Source("pretrain.json", "."),), batch_samples=32, row_tokens=48, threads=2)
    config.train.update(steps=300, lr=6e-3, clip_norm=1.0)
    config.checkpoint.update(every=10_000, keep=1)
    config.log.update(every=25, tensorboard=False)
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = ((".*", config.model.get_ref("base")),)
    return config
