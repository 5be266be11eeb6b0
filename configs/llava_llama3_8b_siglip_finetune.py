"""LLaMA 3.1 8B and SigLIP so400m at 384 pixels, stage 2: projector and language model are trained, the tower is frozen.

    python -m llava_jax.train --config configs/llava_llama3_8b_siglip_finetune.py \
      --workdir runs/llava_llama3_8b_siglip_finetune

It starts from stage 1's projector in runs/llava_llama3_8b_siglip_pretrain. Rows of 4,096 positions hold three to
four samples each; two rows on each of 16 chips, or one on each of 32, make 110 to 130 samples a step. Two rows need
more than a v5e's 16 GB (17.75 GiB); memory and time of one:

    python -m llava_jax.plan --config configs/llava_llama3_8b_siglip_finetune.py --topology v5e:4x8 \
      --config.data.rows_per_chip=1 --config.data.rows_per_group=1 --config.data.images_per_group=5

Data: those of llava15_7b_finetune.
Numbers: LLaVA-MORE's, aimagelab/LLaVA-MORE scripts/llava-more/release_1/08_finetuning_siglip.sh@7156baf: 2e-5, one
  epoch of the mixture of LLaVA-1.5, the tower frozen, 2,048 positions a sample. Its batch depends on its nodes; 128
  is LLaVA-1.5's.
Expected: nobody has published scores of exactly this run; compare yours with llava15_7b_finetune's.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_finetune_packed.py")
    config.model.update(
        preset="llava_llama3_8b_siglip", base="checkpoints/llava_llama3_8b_siglip_base",
        start="runs/llava_llama3_8b_siglip_pretrain",
    )  # fmt: skip
    config.prompt.update(template="llama_3")
    return config
