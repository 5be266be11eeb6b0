"""Config of the demo's stage 2 on wide pictures, each padded to a square; the tower is trained too (see `story.py`)."""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """The demo's stage 2 with a trainable tower, at a fifth of the learning rate as in LLaVA-1.6's."""
    config = start_from(__file__, "stage2.py")
    config.train.vision_lr = 2e-4
    config.rates = (("vision/.*", config.train.get_ref("vision_lr")), (".*", config.train.get_ref("lr")))
    return config
