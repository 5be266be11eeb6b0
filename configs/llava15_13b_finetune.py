"""LLaVA-1.5 13B, stage 2: as llava15_7b_finetune, with Vicuna-13B v1.5.

    python -m llava_jax.train --config configs/llava15_13b_finetune.py --workdir runs/llava15_13b_finetune

Numbers: haotian-liu/LLaVA scripts/v1_5/finetune.sh (it names the 13B; the 7B differs in the model only).
Expected: 5,198 steps, 156 of them warm-up; VQAv2 80.0, GQA 63.3, TextVQA 61.3, POPE 85.9, MME 1531.3
  (docs/MODEL_ZOO.md). The authors took 20 hours on 8 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_finetune.py")
    config.model.update(
        preset="llava15_13b", base="checkpoints/llava15_13b_base", start="runs/llava15_13b_pretrain"
    )  # fmt: skip
    return config
