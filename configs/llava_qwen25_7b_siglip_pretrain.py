"""Qwen2.5 7B and SigLIP so400m at 384 pixels, stage 1: the projector is trained, on packed rows of captions.

    python -m llava_jax.convert assemble checkpoints/llava_qwen25_7b_siglip_base --vision siglip-so400m-patch14-384 \
      --llm Qwen2.5-7B-Instruct --template qwen
    python -m llava_jax.train --config configs/llava_qwen25_7b_siglip_pretrain.py \
      --workdir runs/llava_qwen25_7b_siglip_pretrain

A picture is 729 features: a row of 4,096 positions holds five captions with theirs, so that three rows on each of 16
chips make 240 samples a step. Memory and time:

    python -m llava_jax.plan --config configs/llava_qwen25_7b_siglip_pretrain.py --topology v5e:4x4

Numbers: LLaVA-NeXT's for Qwen2 7B, LLaVA-VL/LLaVA-NeXT scripts/train/pretrain_siglip.sh@5d711ba: 1e-3, one epoch of
  LCS-558K, warm-up 0.03.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_pretrain_packed.py")
    config.model.update(preset="llava_qwen25_7b_siglip", base="checkpoints/llava_qwen25_7b_siglip_base")
    config.data.update(row_tokens=4096)
    return config
