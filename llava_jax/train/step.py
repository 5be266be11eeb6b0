"""The loss and one update, as pure functions. Who only wants to know what is minimised reads this file.

The step knows no layer: the model returns hidden states and the matrix that makes logits of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from llava_jax import config, params, sharding
from llava_jax.batch import AnyBatch, ResizedBatch
from llava_jax.models.llava import Llava
from llava_jax.train.loss import Loss, cross_entropy


class State(NamedTuple):
    """What a step replaces and a checkpoint holds; nothing here belongs to a frozen parameter."""

    step: Int[Array, ""]  # updates done, the skipped ones included
    params: Any  # the trainable subtree, float32
    opt_state: Any


class Metrics(NamedTuple):
    """Scalars of one update."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]  # over the trainable subtree, before clipping
    tokens: Int[Array, ""]  # supervised tokens of the batch
    finite: Bool[Array, ""]  # False: the update was not applied


def train_step(
    model: Llava,
    optimizer: optax.GradientTransformationExtraArgs,
    train: config.Train,
    loss_fn: Loss,
    packed: bool,
    state: State,
    frozen: Mapping[str, Any],
    batch: AnyBatch,
) -> tuple[State, Metrics]:
    """One update of the trainable subtree.

    Where the loss, the gradient or the update is not finite, parameters and optimizer stay as they were and only
    `step` moves on: a poisoned batch costs exactly its own update.
    """

    def loss_of(trainable: Any, batch: AnyBatch, weights: Array, part: Array) -> Array:
        key = jax.random.fold_in(dropped, part) if train.lora_dropout else None
        return weighted_loss(model, params.merge(trainable, frozen), batch, weights, packed, key, loss_fn)

    dropped = jax.random.fold_in(jax.random.key(train.seed), state.step)
    weights = batch.weights / jnp.maximum(jnp.sum(batch.weights), jnp.finfo(jnp.float32).tiny)
    loss, gradients = _accumulate(jax.value_and_grad(loss_of), state.params, batch, weights, train.accumulate)
    norm = optax.tree.norm(gradients)
    if train.offload_optimizer:  # fetched when the gradients are there, or it would be on the device all the while
        moments, gradients = jax.lax.optimization_barrier((state.opt_state, gradients))
        state = state._replace(opt_state=jax.device_put(moments, jax.memory.Space.Device))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, step=state.step)
    # The updates too: a rate too large for float32 turns a finite gradient into infinite weights.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    moved = State(state.step, optax.apply_updates(state.params, updates), opt_state)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    return kept._replace(step=state.step + 1), Metrics(loss, norm, jnp.sum(batch.weights > 0), finite)


def eval_step(
    model: Llava, packed: bool, trainable: Mapping[str, Any], frozen: Mapping[str, Any], batch: AnyBatch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weight times cross-entropy, sum of weights), so that batches add up to a global mean of any run."""
    total = weighted_loss(model, params.merge(trainable, frozen), batch, batch.weights, packed)
    return total, jnp.sum(batch.weights)


def weighted_loss(
    model: Llava,
    parameters: Mapping[str, Any],
    batch: AnyBatch,
    weights: Float[Array, "B T"],
    packed: bool = True,
    key: Array | None = None,
    loss_fn: Loss = cross_entropy,
) -> Float[Array, ""]:
    """Sum over positions of weight times cross-entropy of the target, or another loss of these weights; float32.

    Args:
      packed: rows may hold several samples; False spares the attention their separation.
      key: of the adapters' dropout; None: nothing is dropped.
    """
    hidden = model.apply(
        {"params": parameters}, batch.tokens, batch.positions, batch.segments if packed else None, batch.image_slots,
        batch.pixels, batch.corners if isinstance(batch, ResizedBatch) else None,
        rngs={} if key is None else {"dropout": key},
    )  # fmt: skip
    kernel = model.apply({"params": parameters}, method="head_kernel")
    return loss_fn(hidden, kernel, batch._replace(weights=weights))


def _accumulate(
    gradient: Callable[..., tuple[Array, Any]], trainable: Any, batch: AnyBatch, weights: Array, parts: int
) -> tuple[Array, Any]:
    """Loss and gradient, summed over micro-batches one after another; buffers exist for trainable parameters only."""
    if parts == 1:
        loss, found = gradient(trainable, batch, weights, jnp.int32(0))
        return loss, sharding.constrain_parameters(found)

    def add(sums: tuple[Array, Any], part: tuple[AnyBatch, Array, Array]) -> tuple[tuple[Array, Any], None]:
        loss, found = gradient(trainable, *part)
        return jax.tree.map(jnp.add, sums, (loss, sharding.constrain_parameters(found))), None

    groups = batch.pixels.shape[0]
    micro = jax.tree.map(lambda x: _micro_batches(x, groups, parts), (batch, weights))
    numbers = jnp.arange(parts, dtype=jnp.int32)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(add, (jnp.float32(0), zeros), (*micro, numbers))[0]


def _micro_batches(x: Array, groups: int, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...]; part i takes the groups i, i + parts, ...

    Every device then finds its share of each micro-batch among the rows it already holds.
    """
    rows = x.shape[0] // groups
    x = jnp.moveaxis(x.reshape(groups // parts, parts, rows, *x.shape[1:]), 1, 0)
    return x.reshape(parts, -1, *x.shape[3:])
