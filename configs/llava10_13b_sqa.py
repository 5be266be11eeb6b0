"""LLaVA-1.0 13B on ScienceQA, as the paper: from stage 1's projection, 12 epochs of 12,726 questions.

    python -m llava_jax.train --config configs/llava10_13b_sqa.py --workdir runs/llava10_13b_sqa

Data: ScienceQA's train split in the QCM-LEPA format (question, context, options -> lecture, solution, answer), as
  haotian-liu/LLaVA scripts/convert_sqa_to_llava.py writes it; about half of the questions have a picture.
Numbers: Liu et al. 2023, Visual Instruction Tuning, section 5, and the README of haotian-liu/LLaVA@bfcdfe0:
  learning rate 2e-5, batch 32 = 8 devices x 4 samples, 12 epochs, the "###" template. 4,776 steps, 144 of them warm-up.
  (scripts/finetune_sqa.sh of July 2023 takes Vicuna v1.3, template v1, QCM-LEA and 128 samples: 1,200 steps, 91.09 %.)
Expected: accuracy 90.92 % on the test split (the authors; table 7 of the paper; their released answers give 90.90).
  They took 4 hours on 8 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava10_13b_finetune.py")
    data = "playground/data/ScienceQA"
    config.data.sources = (Source(f"{data}/llava_train_QCM-LEPA.json", f"{data}/images/train", name="ScienceQA"),)
    config.train.epochs = 12
    return config
