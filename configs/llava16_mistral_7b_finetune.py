"""LLaVA-1.6 (NeXT) with Mistral 7B, stage 2: as llava16_7b_finetune, with Mistral-7B-Instruct v0.2.

    python -m llava_jax.train --config configs/llava16_mistral_7b_finetune.py --workdir runs/llava16_mistral_7b_finetune

It starts from stage 1's projector in runs/llava16_mistral_7b_pretrain. Rows and tiles are Vicuna's. Memory and time:

    python -m llava_jax.plan --config configs/llava16_mistral_7b_finetune.py --topology v5e:8x8

Numbers: those of llava16_7b_finetune; LLaVA-NeXT's script names no Mistral, and its rates are the same for all
  decoders. Its template is the one that llava-v1.6-mistral-7b is asked with (LLaVA llava/eval/run_llava.py@c121f04).
Differs from LLaVA-1.6: a sample is cut at 4,096 tokens as Vicuna's, of Mistral's 32,768 positions; what the authors
  took for Mistral is not published, and no picture here has more than 2,928.
Expected: nobody has published scores of exactly this run. llava-v1.6-mistral-7b, trained on 760K records that were
  never published, has VQAv2 82.2, GQA 64.8, TextVQA 65.7, POPE 86.7 (LLaVA docs/MODEL_ZOO.md).
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava16_7b_finetune.py")
    config.model.update(
        preset="llava16_mistral_7b", base="checkpoints/llava16_mistral_7b_base",
        start="runs/llava16_mistral_7b_pretrain",
    )  # fmt: skip
    config.prompt.update(template="mistral_instruct")
    return config
