"""LLaVA-OneVision with Qwen2 7B, stage 1.5: all of the model is trained on knowledge, from stage 1's projector.

    python -m llava_jax.train --config configs/llava_onevision_7b_mid.py --workdir runs/llava_onevision_7b_mid

Rows of 10,240 positions hold about four samples of 1,500 to 3,700 features in up to five tiles of 384 pixels; 64 chips
make some 240 samples a step. Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_7b_mid.py --topology v5e:8x8

Data: the eight files of LLaVA-NeXT scripts/train/mid_stage.yaml@6ca43a6 but instruct_azure_dc_zh_92K, which was never
  released: lmms-lab/LLaVA-ReCap-{558K,118K,CC3M}, whose questions all are "<image>\\nPlease generate detailed
  descriptions of the given image." (scripts/train/README.md@00e3cea), and lmms-lab/LLaVA-OneVision-Mid-Data. Some 4M
  records (docs/LLaVA_OneVision.md@163bce3). Write each as LLaVA's JSON under playground/data/onevision_mid.
Numbers: 1e-5, the tower at 2e-6, one epoch, all of the model (docs/LLaVA_OneVision.md@163bce3); grids of the paper
  (Li et al. 2024, LLaVA-OneVision: 2x2, 1x{2,3}, {2,3}x1 of 384 pixels). No script of this stage was published:
  warm-up, spatial_unpad and the template are those of stage 2, scripts/train/finetune_si.sh@1fcd3d4, and a batch size
  is not known.
Differs from LLaVA-OneVision: a sample is cut at a row's 10,240 tokens, not at 32,768; one record has one picture here.
Expected: nobody has published scores after this stage.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, start_from

FILES = ("llava_recap_558k", "llava_recap_118k", "llava_recap_cc3m", "ureader_tr_sft", "Evol-Instruct-GPT4-Turbo-143K",
         "synthdog_zh_100k", "synthdog_en_100k")  # fmt: skip


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava16_7b_finetune.py")
    config.model.update(
        preset="llava_onevision_7b", base="checkpoints/llava_onevision_7b_base",
        start="runs/llava_onevision_7b_pretrain",
    )  # fmt: skip
    config.prompt.update(template="qwen_2")
    data = "playground/data/onevision_mid"
    config.data.update(
        sources=tuple(Source(f"{data}/{file}.json", f"{data}/images", name=file) for file in FILES),
        sample_tokens=0,  # a row
        images_per_group=16,
    )
    return config
