"""Qwen3 8B and SigLIP so400m at 384 pixels, stage 1: the projector is trained, on packed rows of captions.

    python -m llava_jax.convert assemble checkpoints/llava_qwen3_8b_siglip_base --vision siglip-so400m-patch14-384 \
      --llm Qwen3-8B --template qwen_3
    python -m llava_jax.train --config configs/llava_qwen3_8b_siglip_pretrain.py \
      --workdir runs/llava_qwen3_8b_siglip_pretrain

A picture is 729 features: a row of 4,096 positions holds five captions with theirs, so that three rows on each of 16
chips make 240 samples a step. Memory and time:

    python -m llava_jax.plan --config configs/llava_qwen3_8b_siglip_pretrain.py --topology v5e:4x4

Numbers: ours: those of llava_qwen25_7b_siglip_pretrain. Nobody has published a LLaVA on Qwen3 with its numbers.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_pretrain_packed.py")
    config.model.update(preset="llava_qwen3_8b_siglip", base="checkpoints/llava_qwen3_8b_siglip_base")
    config.data.update(row_tokens=4096)
    return config
