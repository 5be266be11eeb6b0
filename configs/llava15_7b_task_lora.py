"""Fine-tunes a released LLaVA-1.5 on your own LLaVA JSON with LoRA: adapters of the language model and the projector.

    python -m llava_jax.train --config configs/llava15_7b_task_lora.py --workdir runs/task \
        --config.data.sources.0.path=my.json --config.data.sources.0.images=my_pictures

Data, starting weights and batch size are those of llava15_7b_task. Besides the frozen model in bfloat16, 319,815,680
adapter parameters and 20,979,712 of the projector are held in float32; --config.model.frozen_dtype=int8 halves the
frozen language model, --config.lora.rank=16 --config.lora.alpha=32 makes the adapters an eighth.
After it: `python -m llava_jax.convert merge runs/task OUT`, or `convert export --format peft runs/task DST`.
Numbers: haotian-liu/LLaVA scripts/v1_5/finetune_task_lora.sh: rank 128, alpha 256, adapters at 2e-4, projector at 2e-5,
  dropout 0.05 (the default of llava/train/train.py), the rest as in finetune_task.sh.
Expected: as llava15_7b_task.
"""

from ml_collections import ConfigDict

from llava_jax.config import Lora, start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "llava15_7b_task.py")
    config.train.update(lr=2e-4, projector_lr=2e-5, lora_dropout=0.05)
    config.lora = (("llm/.*", Lora(rank=128, alpha=256.0)), (".*", None))
    config.rates = (
        (".*/lora_[ab]", config.train.get_ref("lr")),
        ("projector/.*", config.train.get_ref("projector_lr")),
        (".*", None),
    )
    config.init = ((".*/lora_.*", "random"), (".*", config.model.get_ref("base")))
    return config
