"""Config of the demo's stage 2 without tiles: of a wide picture the whole alone (see `story.py`)."""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """The demo's stage 2 on the first of the pictures that `anyres.py` shows."""
    config = start_from(__file__, "stage2.py")
    config.prompt.image_mode = "squash"
    return config
