"""LLaVA-1.6 (NeXT) with Vicuna 13B, stage 2: as llava16_7b_finetune, with Vicuna-13B v1.5.

    python -m llava_jax.train --config configs/llava16_13b_finetune.py --workdir runs/llava16_13b_finetune

It starts from stage 1's projector in runs/llava16_13b_pretrain. Rows and tiles are the 7B's. Memory and time:

    python -m llava_jax.plan --config configs/llava16_13b_finetune.py --topology v6e:4x8

Numbers: those of llava16_7b_finetune; LLaVA-NeXT's script names no 13B, and its rates are the same for all sizes.
Expected: nobody has published scores of exactly this run. llava-v1.6-vicuna-13b, trained on 760K records that were
  never published, has VQAv2 82.8, GQA 65.4, TextVQA 67.1, POPE 86.2 (LLaVA docs/MODEL_ZOO.md).
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava16_7b_finetune.py")
    config.model.update(
        preset="llava16_13b", base="checkpoints/llava16_13b_base", start="runs/llava16_13b_pretrain"
    )  # fmt: skip
    return config
