"""What no run can have: settings that give NaN or an absurd plan, rows longer than a model can read, ids that it has no
row for. All commands refuse them here, before any work.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_jax.batch import AnyBatch
from llava_jax.errors import UsageError

_MANY = 2**31 - 1  # steps are counted in int32
MAX_STEP_BYTES = 2**38  # a step's batch on all hosts together; those of a pod take a few GB


class Bound(NamedTuple):
    """What a number may be, both ends included."""

    low: int | float
    high: int | float

    def __str__(self) -> str:
        return " to ".join(f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in self)


# Key of a config -> what it may be. Upper ends are far beyond any use: they keep a slip of the keyboard from filling a
# machine's memory, or from planning for hours.
BOUNDS = {
    "data.batch_samples": Bound(1, 2**20),
    "data.row_tokens": Bound(1, 2**20),
    "data.sample_tokens": Bound(0, 2**20),
    "data.rows_per_chip": Bound(0, 2**16),
    "data.rows_per_group": Bound(1, 2**16),
    "data.images_per_group": Bound(1, 4096),
    "data.skip_budget": Bound(0, 0.999999),  # a run of nothing but bad records trains on nothing
    "data.threads": Bound(1, 1024),
    "data.hold_out": Bound(0, 0.9),
    "source.weight": Bound(0, 1000),  # that many times the source in one epoch
    "train.lr": Bound(0, 10),
    "train.projector_lr": Bound(0, 10),
    "train.vision_lr": Bound(0, 10),
    "train.first_lr": Bound(0, 10),
    "train.last_lr": Bound(0, 10),
    "train.steps": Bound(1, _MANY),
    "train.epochs": Bound(1e-9, 100_000),
    "train.seed": Bound(0, 2**63 - 1),  # jax.random.key takes no more
    "train.warmup_ratio": Bound(0, 0.99),  # with 1 no step has the full rate
    "train.b1": Bound(0, 0.999999),  # 1 - b is divided by, and float32 rounds larger ones to 1
    "train.b2": Bound(0, 0.999999),
    "train.eps": Bound(1e-30, 1),  # 0 / (0 + eps) where a gradient is exactly 0; float32 rounds 1e-46 to 0
    "train.weight_decay": Bound(0, 100),
    "train.clip_norm": Bound(1e-9, 1e9),  # 0 makes every update 0
    "train.group_samples": Bound(1, 2**20),
    "train.label_smoothing": Bound(0, 0.999999),  # with 1 no target would count
    "train.z_loss": Bound(0, 1000),
    "train.accumulate": Bound(1, 2**16),
    "train.lora_dropout": Bound(0, 0.99),  # 16 random bits tell no more than 0.99998 from 1
    "train.max_nonfinite": Bound(1, _MANY),
    "train.eval_every": Bound(0, _MANY),
    "train.patience": Bound(0, _MANY),
    "train.sample_every": Bound(0, _MANY),
    "train.watchdog_secs": Bound(1, 1e9),
    "lora.rank": Bound(1, 2**16),
    "lora.alpha": Bound(1e-9, 1e9),  # 0 takes every gradient away
    "checkpoint.every": Bound(1, _MANY),
    "checkpoint.keep": Bound(1, _MANY),
    "log.every": Bound(1, _MANY),
    "profile": Bound(0, 10_000),
}


def check(key: str, value: int | float | None, shown: str = "") -> None:
    """Raises ValueError unless the value of a key is one that it may have; None says nothing and passes.

    Args:
      shown: how the user says the key: `data.sources.0.weight`, `--row-tokens`.
    """
    bound = BOUNDS[key]
    if value is not None and not bound.low <= value <= bound.high:
        raise UsageError(f"{shown or key}={value}: want {bound}")


def check_all(branch: str, values: Mapping[str, Any], shown: str = "") -> None:
    """`check` of all values of a branch of the config that have a bound: check_all("train", vars(train))."""
    for name, value in values.items():
        if f"{branch}.{name}" in BOUNDS:
            check(f"{branch}.{name}", value, f"{shown or branch}.{name}")


def check_rows(
    row_tokens: int, image_features: int, positions: int | None, lengths: Sequence[int] = (),
    shown: str = "data.row_tokens",
) -> None:  # fmt: skip
    """Raises ValueError unless a row holds an image with some text, and the model can tell its positions apart.

    A packed row has no more positions than its longest sample, but one sample may fill it.

    Args:
      image_features: positions that one image takes.
      positions: that the model knows, its stretched rope and its sliding window counted; None: there is no model.
      lengths: of shorter rows, in tokens.
      shown: how the user says row_tokens.
    """
    if row_tokens <= image_features:
        raise UsageError(
            f"{shown}={row_tokens}: an image takes {image_features} positions and its text some more; want "
            f"more than {image_features}"
        )
    longest = max((row_tokens, *lengths))
    if positions is not None and longest > positions:
        raise UsageError(
            f"{shown}={longest}: the model has {positions} positions (those of its training, times the factor "
            f"of a stretched rope, or those of a sliding window); want at most {positions}"
        )


def check_step(rows: int, row_tokens: int, images: int, image_size: int) -> None:
    """Raises ValueError where the batch of one step is absurdly large.

    Args:
      images: of all groups together, each of image_size x image_size pixels.
    """
    # Six int32 or float32 fields of a row, and uint8 pixels.
    size = 24 * rows * row_tokens + 3 * images * image_size**2
    if size > MAX_STEP_BYTES:
        raise UsageError(
            f"a step of {rows:,} rows of {row_tokens:,} tokens and {images:,} images takes {size / 2**30:,.0f} GiB, "
            f"want at most {MAX_STEP_BYTES // 2**30}: lower data.batch_samples (packed: data.rows_per_chip), "
            "data.row_tokens or data.images_per_group"
        )


def check_ids(batch: AnyBatch, rows: int) -> None:
    """Raises ValueError where a batch holds an id that the vocabulary has no row for: its last row would be read.

    Args:
      rows: of the vocabulary, added ones included.
    """
    for name, ids in (("tokens", batch.tokens), ("targets", batch.targets)):
        if ids.size and not 0 <= ids.min() <= ids.max() < rows:
            row, place = np.argwhere((ids < 0) | (ids >= rows))[0].tolist()
            raise UsageError(
                f"batch {name}[{row}, {place}] is the id {ids[row, place]}: the model has {rows} rows of vocabulary, "
                f"so want ids of 0 to {rows - 1}, from the tokenizer that it was made with"
            )
