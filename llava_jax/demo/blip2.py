"""Config of the demo's tiny BLIP-2: a Q-Former is trained for the frozen LLaMA (see `bases.py`).

As in BLIP-2's second stage, tower and decoder are frozen. The linear layer that is trained with it is discarded.
Differs from BLIP-2: there is no first stage; the records are dialogues about all that a picture shows; and the decoder
is that of the demo's MiniGPT-4, where MiniGPT-4's Q-Former was trained with a Flan-T5.
"""

from typing import Any

from llava_jax.config import Source, start_from


def get_config() -> Any:
    """Tables and sizes of the demo's stage 1, with a trainable Q-Former."""
    config = start_from(__file__, "stage1.py")
    config.prompt.update(template="v1", image_mode="squash")
    config.data.update(sources=(Source("finetune.json", "."),), batch_samples=32, row_tokens=128)
    config.train.update(steps=2000, lr=2e-3)
    config.rates = (("(vision|llm)/.*", None), (".*", config.train.get_ref("lr")))
    return config
