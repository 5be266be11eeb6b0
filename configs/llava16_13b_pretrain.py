"""LLaVA-1.6 (NeXT) with Vicuna 13B, stage 1: as llava16_7b_pretrain, with Vicuna-13B v1.5.

    python -m llava_jax.convert assemble checkpoints/llava16_13b_base --newline \
      --vision clip-vit-large-patch14-336 --llm vicuna-13b-v1.5 --projector-type mlp2x_gelu
    python -m llava_jax.train --config configs/llava16_13b_pretrain.py --workdir runs/llava16_13b_pretrain

Numbers: those of llava16_7b_pretrain; LLaVA-NeXT's script names no 13B, and its rates are the same for all sizes.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava16_7b_pretrain.py")
    config.model.update(preset="llava16_13b", base="checkpoints/llava16_13b_base")
    return config
