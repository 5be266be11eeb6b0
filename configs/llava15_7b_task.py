"""Fine-tunes a released LLaVA-1.5 on your own LLaVA JSON.

    python -m llava_jax.convert import llava-v1.5-7b checkpoints/llava15_7b --vision clip-vit-large-patch14-336
    python -m llava_jax.data validate --config configs/llava15_7b_task.py --open-images \
        --config.data.sources.0.path=my.json --config.data.sources.0.images=my_pictures
    python -m llava_jax.train --config configs/llava15_7b_task.py --workdir runs/task \
        --config.data.sources.0.path=my.json --config.data.sources.0.images=my_pictures

Any imported LLaVA-1.5 will do (`--config.model.base=DIR`): sizes and tokenizer are the checkpoint's own, the
template is prompt.template (v1).
Numbers: haotian-liu/LLaVA scripts/v1_5/finetune_task.sh. Differs from LLaVA: the loss is the mean over all supervised
  tokens of a step, which does not depend on how many devices share it.
With fewer than some 10,000 records, use a smaller batch and more epochs: 50 want --config.data.batch_samples=8
  --config.train.epochs=8, 1,000 want 32 and 2; train warns where a run would have too few updates.
Expected: the training loss falls within the first epoch; judge by the loss of held-out records:
  --config.data.hold_out=0.02 --config.train.eval_every=50, or --config.data.validation.0.path=FILE.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(base="checkpoints/llava15_7b")
    config.prompt.update(template="v1", image_mode="pad")
    config.data.update(
        sources=(Source("my.json", "my_pictures"),),
        order="modality_length",
        batch_samples=128,
        row_tokens=2048,
        skip_budget=0.0,  # strict: your own data can be repaired
    )
    config.train.update(
        epochs=1,
        lr=2e-5,
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,
        clip_norm=None,
        loss="token_mean",
    )
    config.rates = (
        ("vision/tail/.*", None),  # never runs
        ("vision/.*", config.train.get_ref("vision_lr")),
        ("projector/.*", config.train.get_ref("projector_lr")),
        ("llm/.*", config.train.get_ref("lr")),
    )
    config.init = ((".*", config.model.get_ref("base")),)
    return config
