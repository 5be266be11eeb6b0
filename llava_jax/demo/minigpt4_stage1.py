"""Config of the demo's MiniGPT-4, stage 1: captions; only the linear layer is trained (see `story.py`)."""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """MiniGPT-4's stage 1 (configs/minigpt4_13b_stage1.py) with sizes and rates for a model of a million parameters."""
    config = start_from(__file__, "stage1.py")
    config.prompt.image_mode = "squash"
    config.train.update(steps=300, weight_decay=0.05)
    return config
