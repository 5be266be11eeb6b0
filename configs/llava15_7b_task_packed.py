"""Fine-tunes a released LLaVA-1.5 on your own LLaVA JSON, on packed rows: llava15_7b_task without padding.

    python -m llava_jax.train --config configs/llava15_7b_task_packed.py --workdir runs/task \
        --config.data.sources.0.path=my.json --config.data.sources.0.images=my_pictures

It differs from llava15_7b_task in the batch: rows of 4,096 positions hold several samples each, so that a step of two
rows on each of 16 chips holds about as many samples as the reference's 128. train prints how many when it starts;
`python -m llava_jax.plan --config configs/llava15_7b_task_packed.py --topology v5e:4x4` prints memory and time. It pays
for some 10,000 records or more; with fewer, llava15_7b_task wastes little and its batches are smaller.
Numbers: those of llava15_7b_task; rows_per_group and images_per_group as in llava15_7b_finetune_packed.
Expected: as llava15_7b_task.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_task.py")
    config.data.update(
        layout="packed", order="shuffle", row_tokens=4096, rows_per_chip=2, rows_per_group=2, images_per_group=10
    )  # fmt: skip
    return config
