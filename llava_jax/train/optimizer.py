"""Optimizers, learning rates over time, and their tables. Frozen parameters have no learning rate and no place."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llava_jax import config, params

# Norm scales and biases do not decay. Source: LLaVA llava/train/llava_trainer.py:162-209 (LayerNorm types, "bias").
# Nor do the gates of cross-attention. Source: open_flamingo/train/train.py@655f693.
DECAY = ((r".*/(scale|bias|attn_gate|ff_gate)", False), (".*", True))


def schedule(train: config.Train, steps: int) -> np.ndarray:
    """float64 [steps]: the share of its peak rate that each update uses.

    Linear from first_lr over ceil(warmup_ratio * steps) updates, then a cosine to last_lr, or constant. Shares are
    relative to `train.lr`. "cosine" begins to fall where the warm-up ends; "cosine_whole" is the cosine over all
    updates, of which the warm-up hides the beginning, so that the rate drops where it ends.
    Source: transformers' get_cosine_schedule_with_warmup, update k (from 1) uses its value k - 1; LAVIS
      lavis/common/optims.py LinearWarmupCosineLRScheduler @ 506965b.
    """
    warmup = math.ceil(train.warmup_ratio * steps)
    first, last = (rate / train.lr if rate else 0.0 for rate in (train.first_lr, train.last_lr))
    update = np.arange(steps, dtype=np.float64)
    start = 0 if train.schedule == "cosine_whole" else warmup
    progress = (update - start) / max(1, steps - start)
    falling = last + (1 - last) * 0.5 * (1 + np.cos(np.pi * progress))
    after = np.ones(steps) if train.schedule == "constant" else falling
    return np.where(update < warmup, first + (1 - first) * update / max(1, warmup), after)


def build(train: config.Train, rates: Mapping[str, config.Rate], steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer over the names of `rates` (peak rates; a tuple has one a layer); `update` also takes `step`, int32.

    The schedule follows `step` and not the optimizer's own count, so an update that is skipped takes its rate
    with it. AdamW's second moment has the dtype of the parameters, float32.
    """
    parts = [] if train.clip_norm is None else [optax.clip_by_global_norm(train.clip_norm)]
    parts += SCALES[train.optimizer](train)
    if train.weight_decay:
        decay = params.unflatten(params.lookup(rates, DECAY, "decay"))
        parts.append(optax.add_decayed_weights(train.weight_decay, mask=decay))
    return optax.chain(*parts, _scale_by_rates(rates, schedule(train, steps)))


def _adamw(train: config.Train) -> list[optax.GradientTransformation]:
    return [optax.scale_by_adam(b1=train.b1, b2=train.b2, eps=train.eps, mu_dtype=train.moment_dtype)]


def _adafactor(train: config.Train) -> list[optax.GradientTransformation]:
    """A row and a column of second moments for each matrix: 0.001 of AdamW's memory.

    Shazeer and Stern 2018 with optax's numbers, without momentum and with absolute rates, as in AdamW; not scaled
    by the size of the parameter, since weights that are fine-tuned have the size they should have.
    """
    return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]


SCALES = {"adamw": _adamw, "adafactor": _adafactor}


def _scale_by_rates(rates: Mapping[str, config.Rate], shares: np.ndarray) -> optax.GradientTransformationExtraArgs:
    """Multiplies every update by minus its rate at `step`."""

    def update(updates: Any, state: Any, params_: Any = None, *, step: jax.Array) -> tuple[Any, Any]:
        share = jnp.asarray(shares, jnp.float32)[step]
        flat = params.flatten(updates)
        return params.unflatten({n: -share * _as_array(rates[n], x.ndim) * x for n, x in flat.items()}), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _as_array(rate: config.Rate, dims: int) -> np.ndarray:
    """A rate as float32 that broadcasts against a parameter; None in a tuple is a layer that stays where it is."""
    values = np.asarray([r or 0.0 for r in rate] if isinstance(rate, tuple) else rate, np.float32)
    return values.reshape(values.shape + (1,) * (dims - 1)) if values.ndim else values


def state_shardings(optimizer: optax.GradientTransformation, state: Any, trainable: Any, other: Any) -> Any:
    """Shardings of an (abstract) optimizer state: what has its parameter's shape lies as that, the rest as `other`."""
    return optax.tree_utils.tree_map_params(
        optimizer, lambda leaf, of: of.sharding if leaf.shape == of.shape else other, state, trainable,
        transform_non_params=lambda _: other,
    )  # fmt: skip
