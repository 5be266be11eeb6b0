"""LLaVA-OneVision with Qwen2 7B, stage 1: only the projector is trained, on captions of whole pictures.

    python -m llava_jax.convert assemble checkpoints/llava_onevision_7b_base --newline --cut-tower \
      --vision siglip-so400m-patch14-384 --llm Qwen2-7B-Instruct --template qwen_2
    python -m llava_jax.train --config configs/llava_onevision_7b_pretrain.py --workdir runs/llava_onevision_7b_pretrain

The stages are this one, llava_onevision_7b_mid (stage 1.5), llava_onevision_7b_si and llava_onevision_7b_ov (stage 2).
Rows are those of llava_qwen25_7b_siglip_pretrain: 240 samples a step on 16 chips. Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_7b_pretrain.py --topology v5e:4x4

Data: those of llava15_7b_pretrain, as LLaVA-NeXT docs/LLaVA_OneVision.md@163bce3 says (LCS-558K).
Numbers: LLaVA-VL/LLaVA-NeXT scripts/train/pretrain_siglip.sh@5d711ba: 1e-3, one epoch, warm-up 0.03, 16 samples a
  device, and gradients clipped as in llava16_7b_pretrain. How many devices is not published. Pictures are squashed to
  384 x 384, as llava/model/multimodal_encoder/siglip_encoder.py@df17966 does where a script gives no
  image_aspect_ratio.
Expected: nothing is published for this stage alone; the steps of an epoch depend on the slice; train prints them.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava_qwen25_7b_siglip_pretrain.py")
    config.model.update(preset="llava_onevision_7b", base="checkpoints/llava_onevision_7b_base")
    config.prompt.update(image_mode="squash")
    config.train.update(clip_norm=1.0)
    return config
