"""LLaVA-1.6 (NeXT) with Vicuna 7B, stage 2: pictures as tiles; projector, newline, decoder and tower are trained.

    python -m llava_jax.train --config configs/llava16_7b_finetune.py --workdir runs/llava16_7b_finetune

It starts from stage 1's projector in runs/llava16_7b_pretrain. A picture is its whole and up to four tiles of 336
pixels, 1,200 to 2,900 positions; rows of 10,240 positions hold about four samples, each cut at Vicuna's 4,096. On a
mixture with the pictures' sizes of LLaVA-1.5's parts 98 % of positions and 93 % of tiles are used
(tests/data/test_planner.py). 32 chips make 138 samples a step (LLaVA-1.6: 128). Memory and time of 64:

    python -m llava_jax.plan --config configs/llava16_7b_finetune.py --topology v5e:8x8

Data: those of llava15_7b_finetune; LLaVA-1.6's 760K records were never published.
Numbers: LLaVA-1.6's own training code was never released; these are LLaVA-NeXT's, LLaVA-VL/LLaVA-NeXT
  scripts/train/finetune_clip.sh@5d711ba: 1e-5, the tower at 2e-6, one epoch, warm-up 0.03, the five grids in this
  order, spatial_unpad; gradients are clipped at a norm of 1, by scripts/zero3.json and transformers' max_grad_norm.
Expected: nobody has published scores of exactly this run; llava-v1.6-vicuna-7b's are those of other data.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_finetune_packed.py")
    config.model.update(
        preset="llava16_7b", base="checkpoints/llava16_7b_base", start="runs/llava16_7b_pretrain"
    )  # fmt: skip
    config.prompt.update(image_mode="anyres", grids="1x2 2x1 2x2 3x1 1x3", merge="spatial_unpad")
    config.data.update(row_tokens=10_240, sample_tokens=4096, rows_per_chip=1, rows_per_group=1, images_per_group=20)
    config.train.update(lr=1e-5, vision_lr=2e-6, clip_norm=1.0)
    config.rates = (("image_newline", config.train.get_ref("lr")), *config.rates)
    return config
