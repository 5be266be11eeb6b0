"""LLaVA-1.6 (NeXT) with Vicuna 7B, stage 1: only the projector is trained, on captions of whole pictures.

    python -m llava_jax.train --config configs/llava16_7b_pretrain.py --workdir runs/llava16_7b_pretrain

Its base has an `image_newline`, which stage 2 needs:

    python -m llava_jax.convert assemble checkpoints/llava16_7b_base --newline \
      --vision clip-vit-large-patch14-336 --llm vicuna-7b-v1.5 --projector-type mlp2x_gelu

Data: those of llava15_7b_pretrain; one picture is one tile here. Memory and time:

    python -m llava_jax.plan --config configs/llava16_7b_pretrain.py --topology v5e:4x4

Numbers: LLaVA-1.6's own training code was never released; these are LLaVA-NeXT's, LLaVA-VL/LLaVA-NeXT
  scripts/train/pretrain_clip.sh@5d711ba: 1e-3, one epoch of LCS-558K, warm-up 0.03; gradients are clipped at a norm of
  1, by scripts/zero3.json and transformers' max_grad_norm. Its batch size is not in the script; 240 samples a step on
  16 chips are LLaVA-1.5's 256, nearly.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_pretrain_packed.py")
    config.model.update(preset="llava16_7b", base="checkpoints/llava16_7b_base")
    config.train.update(clip_norm=1.0)
    return config
