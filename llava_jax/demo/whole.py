"""Config of the demo's stage 2 without tiles: of a wide picture the whole alone (see `story.py`)."""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """The demo's stage 2 on the first of the pictures that `anyres.py` shows, and in its own steps."""
    config = start_from(__file__, "stage2.py")
    config.prompt.image_mode = "squash"
    config.data.batch_samples = 16
    config.train.update(steps=340, lr=1e-3)
    return config
