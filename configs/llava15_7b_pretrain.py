"""LLaVA-1.5 7B, stage 1: only the projector is trained, on 558,128 captions.

    python -m llava_jax.convert assemble checkpoints/llava15_7b_base --vision clip-vit-large-patch14-336 \
        --llm vicuna-7b-v1.5 --projector-type mlp2x_gelu
    python -m llava_jax.train --config configs/llava15_7b_pretrain.py --workdir runs/llava15_7b_pretrain

Data: liuhaotian/LLaVA-Pretrain on the Hugging Face hub, in the folders that LLaVA's own scripts expect.
Numbers: haotian-liu/LLaVA scripts/v1_5/pretrain.sh and the defaults it leaves (AdamW 0.9, 0.999, 1e-8; seed 42;
  no clipping: scripts/zero2.json has no gradient_clipping). 2,181 steps, 66 of them warm-up.
Expected: a training loss of about 2 at the end (thunlp/LLaVA-UHD issue 18). The authors took 3.5 hours on 8 A100-80.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(preset="llava15_7b", base="checkpoints/llava15_7b_base")
    # image_mode: the script gives no image_aspect_ratio, and the reference's default is square.
    config.prompt.update(template="plain", image_mode="square")
    data = "playground/data/LLaVA-Pretrain"
    config.data.update(
        sources=(Source(f"{data}/blip_laion_cc_sbu_558k.json", f"{data}/images", name="LCS-558K"),),
        order="shuffle",
        batch_samples=256,
        row_tokens=2048,
        skip_budget=0.0,  # the archive is complete: a missing picture is a mistake of the download
    )
    config.train.update(
        epochs=1,
        lr=1e-3,
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,
        clip_norm=None,
        loss="group_mean",  # the reference's mean over each device's 32 samples, then over the 8 devices
        group_samples=32,
    )
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = (("projector/.*", "random"), (".*", config.model.get_ref("base")))
    return config
