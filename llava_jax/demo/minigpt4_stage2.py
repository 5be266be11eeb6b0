"""Config of the demo's MiniGPT-4, stage 2: instructions; only the linear layer is trained (see `story.py`).

Differs from MiniGPT-4: asked in the words of LLaVA's template, the only ones that the tiny LLaMA has read, as MiniGPT-4
asks Vicuna in Vicuna's own; and about all that a picture shows, where MiniGPT-4 has descriptions alone.
"""

from typing import Any

from llava_jax.config import start_from


def get_config() -> Any:
    """MiniGPT-4's stage 2 (configs/minigpt4_13b_stage2.py) with sizes and rates for a model of a million parameters."""
    config = start_from(__file__, "minigpt4_stage1.py")
    config.prompt.template = "v1"
    config.data.update(batch_samples=16, row_tokens=128)
    config.train.update(steps=400, lr=3e-3)
    return config
