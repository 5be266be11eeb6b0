"""Config of the run that `doctor` stops and resumes; it fills in paths, the batch and the mesh (`trial.py`)."""

from typing import Any

from llava_jax.config import Source, default


def get_config() -> Any:
    """Stage 2 in miniature: the tower is frozen, and every update changes the loss in its first digits."""
    config = default()
    config.model.update(base="base", dtype="float32", remat="none")
    config.prompt.update(template="v1", image_mode="square")
    config.data.update(sources=(Source("records.json", "."),), batch_samples=8, row_tokens=96, threads=2)
    config.train.update(steps=2000, lr=1e-3, warmup_ratio=0.0, schedule="constant")  # more than any check runs
    config.checkpoint.update(every=4, keep=2)
    config.log.update(every=50, tensorboard=False)
    config.rates = (("vision/.*", None), (".*", config.train.get_ref("lr")))
    config.init = ((".*", config.model.get_ref("base")),)
    return config
