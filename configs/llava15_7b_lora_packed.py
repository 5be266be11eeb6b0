"""LLaVA-1.5 7B, LoRA on packed rows: llava15_7b_lora, without the padding that is over half of its positions.

    python -m llava_jax.train --config configs/llava15_7b_lora_packed.py --workdir runs/llava15_7b_lora_packed

It differs from llava15_7b_lora in the batch, and in starting from llava15_7b_pretrain_packed: rows of 4,096 positions
hold four to five samples each, so that two rows on each of 16 chips make 150 samples a step (the reference: 128).
Memory and time:

    python -m llava_jax.plan --config configs/llava15_7b_lora_packed.py --topology v5e:4x4

On other slices choose rows_per_chip for a similar number of samples a step.
Numbers: those of llava15_7b_lora; rows_per_group and images_per_group fill 99 % of positions and 88 % of the
  image slots (tests/data/test_planner.py).
Expected: as llava15_7b_lora; the steps of an epoch depend on the slice; train prints them when it starts.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_lora.py")
    config.model.update(start="runs/llava15_7b_pretrain_packed")
    config.data.update(
        layout="packed", order="shuffle", row_tokens=4096, rows_per_chip=2, rows_per_group=2, images_per_group=10
    )  # fmt: skip
    config.train.update(loss="token_mean")  # the mean over all tokens: packed rows know no device's share of samples
    return config
