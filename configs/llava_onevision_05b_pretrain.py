"""LLaVA-OneVision with Qwen2 0.5B, stage 1: as llava_onevision_7b_pretrain, with Qwen2-0.5B-Instruct.

    python -m llava_jax.convert assemble checkpoints/llava_onevision_05b_base --newline --cut-tower \
      --vision siglip-so400m-patch14-384 --llm Qwen2-0.5B-Instruct --template qwen_2
    python -m llava_jax.train --config configs/llava_onevision_05b_pretrain.py \
      --workdir runs/llava_onevision_05b_pretrain

Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_05b_pretrain.py --topology v5e:4x4

Numbers: those of llava_onevision_7b_pretrain; LLaVA-NeXT's script names the 7B, and docs/LLaVA_OneVision.md@163bce3
  gives the same rates for all sizes.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava_onevision_7b_pretrain.py")
    config.model.update(preset="llava_onevision_05b", base="checkpoints/llava_onevision_05b_base")
    return config
