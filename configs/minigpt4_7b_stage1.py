"""MiniGPT-4 7B, stage 1: as minigpt4_13b_stage1, with Vicuna 7B v0.

    python -m llava_jax.convert assemble checkpoints/minigpt4_7b_base --vision eva_vit_g.pth \
        --connector blip2_pretrained_flant5xxl.pth --llm vicuna-7b-v0
    python -m llava_jax.train --config configs/minigpt4_7b_stage1.py --workdir runs/minigpt4_7b_stage1

Numbers: as of the 13B; the authors released a 7B later, trained with the same files.
Expected: 20,000 steps, 5,000 of warm-up; 3,149,824 parameters are trained.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "minigpt4_13b_stage1.py")
    config.model.update(preset="minigpt4_7b", base="checkpoints/minigpt4_7b_base")
    return config
