"""LLaVA-OneVision with Qwen2 7B, stage 2 on one vision: single pictures, several, and video, from the single stage's.

    python -m llava_jax.train --config configs/llava_onevision_7b_ov.py --workdir runs/llava_onevision_7b_ov

Of several pictures of a record each is one padded tile of 729 features and a newline. Rows are llava_onevision_7b_si's.
Memory and time:

    python -m llava_jax.plan --config configs/llava_onevision_7b_ov.py --topology v5e:8x8

Data: 1.6M records, the list of LLaVA-NeXT scripts/train/onevision.yaml@e81e007: about 800K of the single stage's
  again, with the shares written there ("first:10%" and so on), lmms-lab/M4-Instruct-Data (the two files of DEMON and of
  Mantis), and 0.32M records of videos, all of three files. Write them as LLaVA's JSON, videos under `video`. What the
  files hold, by scripts/train/README.md@03b70e2:
    academic_source_30s_v1_all, 0718_0_30_s_academic_mc_v0_1_all: lmms-lab/LLaVA-Video-178K, the captions and open-ended
      questions of 0_30_s_academic_v0_1 (the second file's name says multiple choice)
    sharegpt4video_255000: LLaVA-Hound (ShareGPTVideo), 240,000 questions and 15,000 captions of folders of frames
Numbers: LLaVA-VL/LLaVA-NeXT scripts/train/finetune_ov.sh@811422d: those of finetune_si.sh, with at most 32 frames a
  video (frames_upbound), one a second (the default of llava/train/train.py: video_fps).
Differs from LLaVA-OneVision: as llava_onevision_7b_si; a folder shows up to 32 frames, of which LLaVA-NeXT takes 10; a
  record of more than 37 pictures or frames is refused, within the skip budget: raise data.images_per_group.
Expected: nobody has published scores of exactly this run; llava-onevision-qwen2-7b-ov's are those of all the data.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava_onevision_7b_si.py")
    config.model.update(base="runs/llava_onevision_7b_si")
    config.prompt.update(frames=32, fps=1.0)
    data = "playground/data/onevision"
    config.data.update(sources=(Source(f"{data}/onevision.json", f"{data}/images", name="one vision 1.6M"),))
    return config
