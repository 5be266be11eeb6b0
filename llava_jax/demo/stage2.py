"""Config of the demo's stage 2: instructions; projector and decoder are trainable, the tower is frozen."""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """LLaVA's stage 2 (configs/llava15_7b_finetune.py) sized for a model of a million parameters."""
    config = start_from(__file__, "stage1.py")
    config.prompt.template = "v1"
    config.data.update(batch_samples=8, row_tokens=128)
    config.train.update(steps=650, lr=2e-3)
    config.rates = (("vision/.*", None), (".*", config.train.get_ref("lr")))
    return config
