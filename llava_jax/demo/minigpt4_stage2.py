"""Config of the demo's MiniGPT-4, stage 2: instructions; only the linear layer is trained (see `story.py`).

Differs from MiniGPT-4: the template is LLaVA's, the only one in the tiny LLaMA's training texts, as MiniGPT-4 uses
Vicuna's own for Vicuna; and the records cover all that a picture shows, where MiniGPT-4 has descriptions alone.
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
