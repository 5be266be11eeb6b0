"""LLaVA-1.0 13B, stage 2 of the paper: projection and language model are trained on 157,712 conversations.

    python -m llava_jax.train --config configs/llava10_13b_finetune.py --workdir runs/llava10_13b_finetune

Data: llava_instruct_150k.json of liuhaotian/LLaVA-Instruct-150K and the pictures of COCO train2017.
Numbers: Liu et al. 2023, Visual Instruction Tuning, section 5, and the README of haotian-liu/LLaVA@bfcdfe0:
  learning rate 2e-5, batch 32 = 8 devices x 4 samples, 3 epochs, the "###" template. 14,787 steps, 444 of them warm-up.
  (scripts/finetune_full_schedule.sh of July 2023 takes 128 samples: --config.data.batch_samples=128, 3,699 steps.)
Differs from LLaVA: no <im_start>/<im_end> around the picture; see llava10_13b_pretrain.
Expected: LLaVA-Bench (COCO) 85.1 relative to GPT-4 (the authors; abstract). They took 10 hours on 8 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(
        preset="llava10_13b", base="checkpoints/llava10_13b_base", start="runs/llava10_13b_pretrain"
    )  # fmt: skip
    config.prompt.update(template="llava_v0", image_mode="square")
    data = "playground/data"
    config.data.update(
        sources=(Source(f"{data}/llava_instruct_150k.json", f"{data}/coco/train2017", name="Instruct-158K"),),
        order="shuffle",
        batch_samples=32,
        row_tokens=2048,
        skip_budget=0.0,  # COCO is complete: a missing picture is a mistake of the download
    )
    config.train.update(
        epochs=3,
        lr=2e-5,
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,
        clip_norm=None,
        loss="group_mean",  # the reference's mean over each device's 4 samples, then over the 8 devices
        group_samples=4,
    )
    # A 13B step is 157 GB on disk (float32 weights and two moments); a preempted run saves by itself.
    config.checkpoint.update(every=2000, keep=1)
    config.rates = (
        ("vision/tail/.*", None),  # never runs
        ("vision/.*", config.train.get_ref("vision_lr")),
        ("projector/.*", config.train.get_ref("projector_lr")),
        ("llm/.*", config.train.get_ref("lr")),
    )
    config.init = (("projector/.*", config.model.get_ref("start")), (".*", config.model.get_ref("base")))
    return config
