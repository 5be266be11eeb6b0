"""LLaVA-1.5 13B, stage 1: as llava15_7b_pretrain, with Vicuna-13B v1.5.

    python -m llava_jax.convert assemble checkpoints/llava15_13b_base --vision clip-vit-large-patch14-336 \
        --llm vicuna-13b-v1.5 --projector-type mlp2x_gelu
    python -m llava_jax.train --config configs/llava15_13b_pretrain.py --workdir runs/llava15_13b_pretrain

Numbers: haotian-liu/LLaVA scripts/v1_5/pretrain.sh (it names the 13B; the 7B differs in the model only).
Expected: 2,181 steps, 66 of them warm-up. The authors took 5.5 hours on 8 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_pretrain.py")
    config.model.update(preset="llava15_13b", base="checkpoints/llava15_13b_base")
    return config
