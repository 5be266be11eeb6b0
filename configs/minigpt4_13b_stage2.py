"""MiniGPT-4 13B, stage 2: the same linear layer on about 3,500 curated descriptions, with four instructions.

    python -m llava_jax.data prepare cc-sbu-align --from data/cc_sbu_align --out data
    python -m llava_jax.train --config configs/minigpt4_13b_stage2.py --workdir runs/minigpt4_13b_stage2

The descriptions are MiniGPT-4's own (filter_cap.json), or those that the steps of `python -m llava_jax.datagen curate`
make of your pictures: describe (--checkpoint runs/minigpt4_13b_stage1 --template minigpt4), correct, filter, review and
export, all with --out data/cc_sbu_align.
Numbers: Vision-CAIR/MiniGPT-4 train_configs/minigpt4_stage2_finetune.yaml @ d94738a: 5 x 200 steps of 12 samples on one
  device, answers of 160 tokens at most, no clipping. The paper says 400 steps; that file, and its schedule, say 1,000.
Differs from MiniGPT-4: the instruction is drawn for each sample, theirs for each batch; bfloat16 for float16; a row
  has 256 positions, so the longest descriptions keep a little more than 160 tokens.
Expected: 1,000 steps, 200 of warm-up; the learning rate falls from 2.986e-5 to 2.809e-5 where that ends. The
  authors took 7 minutes for 400 steps on one A100.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(
        preset="minigpt4_13b", base="checkpoints/minigpt4_13b_base", start="runs/minigpt4_13b_stage1"
    )  # fmt: skip
    config.prompt.update(template="minigpt4", image_mode="squash")
    config.data.update(
        sources=(Source("data/cc_sbu_align.json", "data/cc_sbu_align/image"),), batch_samples=12, row_tokens=256
    )
    config.train.update(
        steps=1_000, warmup_ratio=0.2, schedule="cosine_whole", lr=3e-5, first_lr=1e-6, last_lr=1e-5, weight_decay=0.05
    )
    config.checkpoint.update(every=200, keep=5)
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = (("projector/.*", config.model.get_ref("start")), (".*", config.model.get_ref("base")))
    return config
