"""LLaVA-1.5 13B, stage 1 on packed rows: llava15_13b_pretrain, without the padding that is most of its positions.

    python -m llava_jax.train --config configs/llava15_13b_pretrain_packed.py --workdir runs/llava15_13b_pretrain_packed

It differs from llava15_13b_pretrain in the batch alone: a row of 3,072 positions holds five captions with their
pictures, so that three rows on each of 16 chips make 240 samples a step (the reference: 256). Memory and time:

    python -m llava_jax.plan --config configs/llava15_13b_pretrain_packed.py --topology v5e:4x4

On other slices choose rows_per_chip for a similar number of samples a step.
Numbers: those of llava15_13b_pretrain; 3,072 is the multiple of 512 that five samples of 605 tokens fill best, to 98 %
  (tests/data/test_planner.py).
Expected: as llava15_13b_pretrain; the steps of an epoch depend on the slice; train prints them when it starts.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_13b_pretrain.py")
    config.data.update(layout="packed", rows_per_chip=3, row_tokens=3072, images_per_group=5)
    config.train.update(loss="token_mean")  # the mean over all tokens: packed rows know no device's share of samples
    return config
