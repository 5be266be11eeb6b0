"""LLaVA-OneVision with Qwen2 0.5B, stage 2 on single pictures: as llava_onevision_7b_si, with Qwen2-0.5B-Instruct.

    python -m llava_jax.train --config configs/llava_onevision_05b_si.py --workdir runs/llava_onevision_05b_si

Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_05b_si.py --topology v5e:8x8

Numbers: those of llava_onevision_7b_si; the script names the 7B, and docs/LLaVA_OneVision.md@163bce3 gives the same
  rates for all sizes. A batch size of the 0.5B is not published.
Expected: nobody has published scores of exactly this run. llava-onevision-qwen2-0.5b-si, trained on all of the data,
  has AI2D 54.2, ChartQA 61.0, DocVQA 75.0 (its model card).
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava_onevision_7b_si.py")
    config.model.update(preset="llava_onevision_05b", base="runs/llava_onevision_05b_mid")
    return config
