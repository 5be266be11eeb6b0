"""LLaVA-OneVision with Qwen2 7B, stage 2 on single pictures: all of the model is trained, from stage 1.5's.

    python -m llava_jax.train --config configs/llava_onevision_7b_si.py --workdir runs/llava_onevision_7b_si

A picture is its whole and up to 36 tiles of 384 pixels, up to some 7,300 features: those of more than nine tiles are
resized. Rows of 16,384 positions hold four to six samples and pools of 37 tiles any picture; 64 chips make some 260 to
380 samples a step. Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_7b_si.py --topology v5e:8x8

Data: 3.2M records, the list of LLaVA-NeXT scripts/train/single_image.yaml@3d23f13, published as
  lmms-lab/LLaVA-OneVision-Data but llava_wild_4v_39k and llava_wild_4v_12k, which were never released. Write them as
  LLaVA's JSON.
Numbers: LLaVA-VL/LLaVA-NeXT scripts/train/finetune_si.sh@1fcd3d4: 1e-5, the tower at 2e-6, one epoch, warm-up 0.03,
  anyres_max_9 with the grids (1x1) to (6x6) in this order, spatial_unpad, qwen_1_5. It recommends 128 devices with one
  sample and two micro-batches for the 7B, 256 samples a step.
Differs from LLaVA-OneVision: a sample is cut at a row's 16,384 tokens, not at 32,768; packed rows mix lengths where the
  script groups samples of like length; qwen_2 has qwen_1_5's words but supervises answers alone, not their headers.
Expected: nobody has published scores of exactly this run; llava-onevision-qwen2-7b-si's are those of all the data.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava_onevision_7b_mid.py")
    config.model.update(base="runs/llava_onevision_7b_mid", start="")
    grids = " ".join(f"{columns}x{rows}" for columns in range(1, 7) for rows in range(1, 7))
    config.prompt.update(grids=grids, max_tiles=9, several="pad")
    data = "playground/data/onevision"
    config.data.update(
        sources=(Source(f"{data}/single_image.json", f"{data}/images", name="single image 3.2M"),),
        row_tokens=16_384, images_per_group=37,
    )  # fmt: skip
    config.init = ((".*", config.model.get_ref("base")),)
    return config
