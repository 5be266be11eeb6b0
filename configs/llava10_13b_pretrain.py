"""LLaVA-1.0 13B, stage 1 of the paper: only the linear projection is trained, on 595,375 captions of CC3M.

    python -m llava_jax.convert assemble checkpoints/llava10_13b_base --vision clip-vit-large-patch14 \
        --llm vicuna-13b-v0 --projector-type linear --legacy true    (transformers' only behaviour at its time)
    python -m llava_jax.train --config configs/llava10_13b_pretrain.py --workdir runs/llava10_13b_pretrain

Data: liuhaotian/LLaVA-CC3M-Pretrain-595K (chat.json: each caption answers one of 11 requests to describe).
Numbers: Liu et al. 2023, Visual Instruction Tuning, section 5, and the README of haotian-liu/LLaVA@bfcdfe0:
  learning rate 2e-3, batch 128 = 8 devices x 16 samples, one epoch, the "###" template. 4,652 steps, 140 of warm-up.
Differs from LLaVA: no <im_start>/<im_end> around the picture. The first release trained these two
  embeddings with the projection for chat and left them out for ScienceQA ("no_im_token"); every later recipe leaves
  them out. So one projection serves both fine-tunes.
Expected: a training loss near 2. The authors took 4 hours on 8 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(preset="llava10_13b", base="checkpoints/llava10_13b_base")
    config.prompt.update(template="llava_v0", image_mode="square")
    data = "playground/data/LLaVA-CC3M-Pretrain-595K"
    config.data.update(
        sources=(Source(f"{data}/chat.json", f"{data}/images", name="CC3M-595K"),),
        order="shuffle",
        batch_samples=128,
        row_tokens=2048,
        skip_budget=0.0,  # the archive is complete: a missing picture is a mistake of the download
    )
    config.train.update(
        epochs=1,
        lr=2e-3,
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,
        clip_norm=None,
        loss="group_mean",  # the reference's mean over each device's 16 samples, then over the 8 devices
        group_samples=16,
    )
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = (("projector/.*", "random"), (".*", config.model.get_ref("base")))
    return config
