"""Qwen3 8B and SigLIP so400m at 384 pixels, stage 2: projector, language model and tower (at 2e-6) are trained.

    python -m llava_jax.train --config configs/llava_qwen3_8b_siglip_finetune.py \
      --workdir runs/llava_qwen3_8b_siglip_finetune

It starts from stage 1's projector in runs/llava_qwen3_8b_siglip_pretrain. Rows of 4,096 positions hold three to
four samples each; two rows on each of 16 chips, or four on each of 8, make 110 to 130 samples a step. Two rows
need more than a v5e's 16 GB, as with Qwen2.5; memory and time of four:

    python -m llava_jax.plan --config configs/llava_qwen3_8b_siglip_finetune.py --topology v5p:2x2x2 \
      --config.data.rows_per_chip=4

Data: those of llava15_7b_finetune.
Numbers: ours: those of llava_qwen25_7b_siglip_finetune. Nobody has published a LLaVA on Qwen3 with its numbers.
Expected: nobody has published scores of exactly this run; compare yours with llava15_7b_finetune's.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_finetune_packed.py")
    config.model.update(
        preset="llava_qwen3_8b_siglip", base="checkpoints/llava_qwen3_8b_siglip_base",
        start="runs/llava_qwen3_8b_siglip_pretrain",
    )  # fmt: skip
    config.prompt.update(template="qwen_3")
    config.train.update(lr=1e-5, vision_lr=2e-6)
    return config
