"""Whether a run can learn at all: what is wrong is refused before it starts, what looks wrong is a warning.

A warning names the number and the remedy. It is printed where it arises and once more at the end of the run.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_jax import config as configs
from llava_jax.errors import UsageError
from llava_jax.models.presets import LlamaConfig

FEW_UPDATES = 20  # fewer than this teach a pretrained model hardly anything
SETTLED = 10  # updates after the warm-up, by when a pretrained model is far better than guessing


def before(config: configs.Config, rates: np.ndarray, records: int) -> list[str]:
    """Warnings about the learning rates of all updates (float [steps], the highest of all parameters).

    Raises:
      UsageError: no update has a learning rate.
    """
    updates, data = int((rates > 0).sum()), config.data
    size = f"data.batch_samples={data.batch_samples}" if data.layout == "padded" else f"{data.row_tokens} tokens a row"
    remedy = (f"{records:,} records at {size} make {len(rates)} steps: set --config.train.epochs=N (or steps) higher, "
              "or --config.data.batch_samples lower, with --config.train.group_samples a divisor of it")  # fmt: skip
    if not updates:
        raise UsageError(
            f"no update has a learning rate: train.lr={config.train.lr} and of {len(rates)} step(s) the first "
            f"{math.ceil(config.train.warmup_ratio * len(rates))} warm up from 0. {remedy}"
        )
    return [f"only {updates} updates have a learning rate. {remedy}"] if updates < FEW_UPDATES else []


def after(row: Mapping[str, Any], model: LlamaConfig, warmup: int) -> list[str]:
    """Warnings about one row of metrics.jsonl; `warmup` is the number of warm-up updates."""
    if not row["tokens"]:
        return ["a batch has no supervised tokens, so its loss is 0: see `python -m llava_jax.data show RECORDS`"]
    if row["loss"] == 0:
        return ["the loss is exactly 0: are the answers in the prompt, or the targets all one token?"]
    chance = math.log(model.vocab)
    if row["step"] == warmup + SETTLED and row["loss"] >= chance:
        return [f"the loss after the warm-up is {row['loss']:.2f}, no better than guessing among {model.vocab:,} words "
                f"(ln = {chance:.2f}): do the weights, the tokenizer and prompt.template belong together?"]  # fmt: skip
    return []
