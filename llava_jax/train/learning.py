"""Whether a run can learn at all: what is wrong is refused before it starts, what looks wrong is a warning.

A warning names the number and the remedy. It is printed where it arises and once more at the end of the run.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_jax import config as configs
from llava_jax.data.tally import fitting
from llava_jax.errors import UsageError
from llava_jax.models.parts import DecoderConfig

FEW_UPDATES = 20  # fewer than this teach a pretrained model hardly anything
SETTLED = 10  # updates after the warm-up, by when a pretrained model is far better than guessing


def before(config: configs.Config, rates: np.ndarray, samples: int, step_samples: float, parts: int) -> list[str]:
    """Warnings about the size of the data and the learning rates of all updates.

    Args:
      rates: float [steps], the highest of all parameters.
      samples: of an epoch; step_samples: of a step.
      parts: that the mesh cuts a step's rows into.

    Raises:
      UsageError: no update has a learning rate.
    """
    updates = int((rates > 0).sum())
    made = f", train.steps={config.train.steps}" if config.train.steps else f" make {len(rates)} step(s)"
    remedy = f"{samples:,} samples in steps of {step_samples:,.0f}{made}: set {_fitting(config, samples, parts)}"
    if not updates and len(rates) >= FEW_UPDATES:
        raise UsageError(f"no update has a learning rate: train.lr={config.train.lr}; want it above 0")
    if not updates:
        raise UsageError(
            f"no update has a learning rate: train.lr={config.train.lr} and of {len(rates)} step(s) the first "
            f"{math.ceil(config.train.warmup_ratio * len(rates))} warm up from 0. {remedy}"
        )
    if updates < FEW_UPDATES:
        return [f"only {updates} updates have a learning rate. {remedy}"]
    return [f"a step shows records more than once. {remedy}"] if samples < step_samples else []


def _fitting(config: configs.Config, samples: int, parts: int) -> str:
    """Options with which so many samples make a run."""
    batch, epochs = fitting(samples, parts * config.train.accumulate)
    settings = {"data.layout": "padded", "data.rows_per_chip": 0, "data.rows_per_group": 1}
    settings = settings if config.data.layout == "packed" else {}
    if config.data.share_images:
        settings["data.share_images"] = False
    settings["data.batch_samples"] = batch
    if config.train.loss == "group_mean":
        settings["train.group_samples"] = batch
    if config.train.steps:
        settings["train.steps"] = epochs * math.ceil(samples / batch)
    else:
        settings["train.epochs"] = epochs
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def after(row: Mapping[str, Any], model: DecoderConfig, warmup: int) -> list[str]:
    """Warnings about one row of metrics.jsonl; `warmup` is the number of warm-up updates."""
    if not row["tokens"]:
        return ["a batch has no supervised tokens, so its loss is 0: see `python -m llava_jax.data show RECORDS`"]
    if row["loss"] == 0:
        return ["the loss is exactly 0: are the answers in the prompt, or the targets all one token?"]
    if row["grad_norm"] == 0:
        return ["the gradient of a step is exactly 0: nothing in its records reaches a parameter that `rates` trains. "
                "Text without a picture teaches a projector nothing, and a tower's last block may never run"]
    chance = math.log(model.vocab)
    if row["step"] == warmup + SETTLED and row["loss"] >= chance:
        return [f"the loss after the warm-up is {row['loss']:.2f}, no better than guessing among {model.vocab:,} words "
                f"(ln = {chance:.2f}): do the weights, the tokenizer and prompt.template belong together?"]  # fmt: skip
    return []
