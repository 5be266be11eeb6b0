"""LLaVA-1.5 7B, stage 2 on rows of one picture: llava15_7b_finetune_packed, a picture and the words before it once.

    python -m llava_jax.train --config configs/llava15_7b_finetune_shared.py --workdir runs/llava15_7b_finetune_shared

It differs from llava15_7b_finetune_packed in what shares a row: 364,100 of the 665,298 records are about COCO's 118,287
pictures, and those of one picture lie together, so that an epoch has 26 % fewer positions and 39 % fewer pictures. A
record's loss and gradient are those of a row of its own; what differs is the company: two rows on each of 16 chips make
200 samples a step, of some 128 pictures and texts (the reference: 128 samples). Memory and time:

    python -m llava_jax.plan --config configs/llava15_7b_finetune_shared.py --topology v5e:4x4

On other slices choose rows_per_chip for a similar number of samples a step.
Numbers: those of llava15_7b_finetune_packed; images_per_group fills 81 % of the image slots, rows are 99 % full
  (tests/plan/test_mixture.py, which says how many records a picture are assumed).
Expected: as llava15_7b_finetune; nobody has trained it to the end. An epoch has a quarter fewer steps.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_finetune_packed.py")
    config.data.update(share_images=True, images_per_group=9)
    return config
