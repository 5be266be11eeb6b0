"""Config of the demo's tiny BLIP-2: a Q-Former learns to be read by the frozen LLaMA (see `bases.py`).

As in BLIP-2's second stage, tower and decoder are frozen. The linear layer that learns with it is thrown away.
Differs from BLIP-2: there is no first stage; what is read are dialogues, which speak of all that a picture shows; and
the decoder is the one that the demo's MiniGPT-4 is joined to, where MiniGPT-4's Q-Former had learned with a Flan-T5.
"""

from typing import Any

from llava_jax.config import Source, start_from


def get_config() -> Any:
    """Tables and sizes of the demo's stage 1, with the Q-Former among what is trained."""
    config = start_from(__file__, "stage1.py")
    config.prompt.update(template="v1", image_mode="squash")
    config.data.update(sources=(Source("finetune.json", "."),), batch_samples=32, row_tokens=128)
    config.train.update(steps=2000, lr=2e-3)
    config.rates = (("(vision|llm)/.*", None), (".*", config.train.get_ref("lr")))
    return config
