"""MiniGPT-4 13B, stage 1: one linear layer between BLIP-2's frozen Q-Former and a frozen Vicuna v0, on 5 M captions.

    python -m llava_jax.convert assemble checkpoints/minigpt4_13b_base --vision eva_vit_g.pth \
        --connector blip2_pretrained_flant5xxl.pth --llm vicuna-13b-v0
    python -m llava_jax.train --config configs/minigpt4_13b_stage1.py --workdir runs/minigpt4_13b_stage1

Sources are directories of img2dataset's tar shards. The paper mixes LAION to Conceptual Captions and SBU 115 : 14, the
proportion of their sizes; of n pairs and m, data.sources.0.weight = 115 / 14 * m / n mixes them so.
Numbers: Vision-CAIR/MiniGPT-4 train_configs/minigpt4_stage1_pretrain.yaml @ d94738a: 4 x 5,000 steps of 4 x 64 samples,
  answers of 32 tokens at most (1 + 32 + 32 positions), the mean of each device's mean loss, no clipping.
Differs from MiniGPT-4: a batch holds both sources, theirs one at a time; bfloat16 instead of float16 with loss scaling;
  the "\\n" that ends a caption is supervised after every caption that is not cut, as there.
Expected: 20,000 steps, 5,000 of warm-up; the learning rate falls from 9.998e-5 to 9.707e-5 where that ends. 3,937,280
  parameters are trained. The authors took 10 hours on 4 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(preset="minigpt4_13b", base="checkpoints/minigpt4_13b_base")
    config.prompt.update(template="plain", image_mode="squash")
    config.data.update(
        sources=(Source("data/laion"), Source("data/cc_sbu")), batch_samples=256, row_tokens=65, skip_budget=1e-3
    )
    config.train.update(
        steps=20_000, warmup_ratio=0.25, schedule="cosine_whole", lr=1e-4, first_lr=1e-6, last_lr=8e-5,
        weight_decay=0.05, loss="group_mean", group_samples=64,
    )  # fmt: skip
    config.checkpoint.update(every=5_000)
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = (("projector/.*", "random"), (".*", config.model.get_ref("base")))
    return config
