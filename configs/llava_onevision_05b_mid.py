"""LLaVA-OneVision with Qwen2 0.5B, stage 1.5: as llava_onevision_7b_mid, with Qwen2-0.5B-Instruct.

    python -m llava_jax.train --config configs/llava_onevision_05b_mid.py --workdir runs/llava_onevision_05b_mid

Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_05b_mid.py --topology v5e:8x8

Numbers: those of llava_onevision_7b_mid; docs/LLaVA_OneVision.md@163bce3 gives the same rates for all sizes.
Expected: nobody has published scores after this stage.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava_onevision_7b_mid.py")
    config.model.update(
        preset="llava_onevision_05b", base="checkpoints/llava_onevision_05b_base",
        start="runs/llava_onevision_05b_pretrain",
    )  # fmt: skip
    return config
