"""LLaVA-1.6 (NeXT) with Mistral 7B, stage 1: as llava16_7b_pretrain, with Mistral-7B-Instruct v0.2.

    python -m llava_jax.convert assemble checkpoints/llava16_mistral_7b_base --newline \
      --vision clip-vit-large-patch14-336 --llm Mistral-7B-Instruct-v0.2 --projector-type mlp2x_gelu \
      --template mistral_instruct
    python -m llava_jax.train --config configs/llava16_mistral_7b_pretrain.py --workdir runs/llava16_mistral_7b_pretrain

Numbers: those of llava16_7b_pretrain; LLaVA-NeXT's script names no Mistral, and its rates are the same for all
  decoders.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava16_7b_pretrain.py")
    config.model.update(preset="llava16_mistral_7b", base="checkpoints/llava16_mistral_7b_base")
    return config
