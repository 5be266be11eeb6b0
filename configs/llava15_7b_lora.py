"""LLaVA-1.5 7B, stage 2 with LoRA: adapters of the language model and the whole projector are trained.

    python -m llava_jax.train --config configs/llava15_7b_lora.py --workdir runs/llava15_7b_lora

Data and start as llava15_7b_finetune. Besides the frozen model in bfloat16, 319,815,680 adapter parameters and
20,979,712 of the projector are held in float32; --config.model.frozen_dtype=int8 halves the frozen language model.
After it: `python -m llava_jax.convert merge runs/llava15_7b_lora OUT`, or
`python -m llava_jax.convert export --format peft runs/llava15_7b_lora DST` (for vLLM with --split-projector).
To continue training an adapter, imported or of an earlier run: set model.base to its directory and remove the row of
`init` for ".*/lora_.*".
Numbers: haotian-liu/LLaVA scripts/v1_5/finetune_lora.sh: rank 128, alpha 256, adapters at 2e-4, projector at 2e-5,
  dropout 0.05 (the default of llava/train/train.py), the rest as in finetune.sh.
Expected: losses as in llava15_7b_finetune; VQAv2 79.1, GQA 63.0, TextVQA 58.2, POPE 86.4, MME 1476.9
  (docs/MODEL_ZOO.md).
"""

from ml_collections import ConfigDict

from llava_jax.config import Lora, start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_finetune.py")
    config.train.update(lr=2e-4, projector_lr=2e-5, lora_dropout=0.05)
    config.checkpoint.update(every=500, keep=2)  # a step is 4 GB, not 80
    config.lora = (("llm/.*", Lora(rank=128, alpha=256.0)), (".*", None))
    config.rates = (
        (".*/lora_[ab]", config.train.get_ref("lr")),
        ("projector/.*", config.train.get_ref("projector_lr")),
        (".*", None),
    )
    config.init = (
        (".*/lora_.*", "random"),
        ("projector/.*", config.model.get_ref("start")),
        (".*", config.model.get_ref("base")),
    )
    return config
