"""MiniGPT-4 7B, stage 2: as minigpt4_13b_stage2, with Vicuna 7B v0.

    python -m llava_jax.train --config configs/minigpt4_7b_stage2.py --workdir runs/minigpt4_7b_stage2

Numbers: as of the 13B; the authors released a 7B later, trained with the same files.
Expected: 1,000 steps, 200 of warm-up.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "minigpt4_13b_stage2.py")
    config.model.update(preset="minigpt4_7b", base="checkpoints/minigpt4_7b_base", start="runs/minigpt4_7b_stage1")
    return config
