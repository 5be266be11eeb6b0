"""Stage 2 of a tiny model, from what tiny_pretrain wrote: projector and language model are trained, the tower is not.

    python -m llava_jax.train --config configs/tiny_finetune.py --workdir runs/tiny_finetune \
        --config.data.sources.0.path=my.json --config.data.sources.0.images=my_pictures

Numbers: as tiny_pretrain, with the template and the order of LLaVA-1.5's stage 2.
Expected: 20 steps; the loss falls from near 6.9 as the language model learns which words are frequent.
"""

from ml_collections import ConfigDict

from llava_jax.config import start_from


def get_config() -> ConfigDict:
    config = start_from(__file__, "tiny_pretrain.py")
    config.model.update(base="runs/tiny_pretrain")
    config.prompt.update(template="v1", image_mode="pad")
    config.data.update(order="modality_length", row_tokens=256)
    config.train.update(lr=1e-3, group_samples=4)
    config.rates = (
        ("vision/tail/.*", None),  # never runs
        ("vision/.*", config.train.get_ref("vision_lr")),
        ("projector/.*", config.train.get_ref("projector_lr")),
        ("llm/.*", config.train.get_ref("lr")),
    )
    return config
