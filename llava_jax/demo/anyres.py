"""Config of the demo's stage 2 with tiles: of a wide picture the whole and four tiles (see `story.py`)."""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """LLaVA-1.6's stage 2 (configs/llava16_7b_finetune.py) sized for a model of a million parameters.

    A picture takes 84 positions in place of 16, so rows are longer by 68; `image_newline` is trained too. Differs from
    LLaVA-1.6: the tower is frozen.
    """
    config = start_from(__file__, "whole.py")
    config.prompt.update(image_mode="anyres", grids="4x1", merge="spatial_unpad")
    config.data.update(images_per_group=5, row_tokens=196)
    return config
