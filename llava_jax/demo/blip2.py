"""Config of the demo's tiny BLIP-2: a Q-Former learns to be read by the frozen LLaMA (see `bases.py`).

As in BLIP-2's second stage, tower and decoder are frozen. The linear layer that learns with it is thrown away.
Differs from BLIP-2: there is no first stage, and what is read are dialogues, which speak of all that a picture shows.
"""

from typing import Any

from llava_jax.config import Source, start_from


def get_config() -> Any:
    config = start_from(__file__, "stage1.py")
    config.prompt.update(template="v1", image_mode="squash")
    config.data.update(sources=(Source("finetune.json", "."),), batch_samples=32, row_tokens=128)
    config.train.update(steps=2000, lr=2e-3)
    config.rates = (("(vision|llm)/.*", None), (".*", config.train.get_ref("lr")))
    return config
