"""Losses over log-probabilities of the supervised tokens, a few at a time: the logits of a whole row never exist.

`summed` makes its gradient in the same pass as the loss, while a chunk's logits are there: making them a second time
would be a third of the head's work, and a scan's own gradient would exchange the head's between devices at every chunk.
It takes the loss of each token by itself; `logps` serves all other losses, and its gradient costs that third.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from llava_jax import config, sharding
from llava_jax.batch import AnyBatch

# Positions of one device whose logits exist at once: 512 x 32,000 float32 logits are 65 MB.
CHUNK = 512


class Logps(NamedTuple):
    """What the logits say at each position, in float32. A field that a loss does not read is not computed."""

    target: Float[Array, "..."]  # log-probability of the target
    lse: Float[Array, "..."]  # log of the sum of exp(logits)
    mean: Float[Array, "..."]  # mean over the vocabulary of the log-probabilities


# (hidden [B, T, D], kernel [D, V], batch) -> what is minimised. The weights of all micro-batches of a step together sum
# to 1: a loss that counts tokens, or samples, by their weights is the same on any mesh and in any packing. A prefix
# that samples share (`data.share_images`) stands there once, with weight 0.
Loss = Callable[[Array, Array, AnyBatch], Array]
TokenLoss = Callable[..., Array]  # Logps of [P] -> the loss of each of these tokens, by itself


def terms(train: config.Train) -> dict[str, tuple[float, TokenLoss]]:
    """{key: (its value, what is added to each token's cross-entropy, so many times)}, but for keys at 0.

    Source: label smoothing, Szegedy et al. 2016, section 7; z-loss, Chowdhery et al. 2022 (PaLM), section 5.
    """
    every: dict[str, tuple[float, TokenLoss]] = {
        "label_smoothing": (train.label_smoothing, lambda logps: logps.target - logps.mean),
        "z_loss": (train.z_loss, lambda logps: logps.lse**2),
    }
    return {key: (value, term) for key, (value, term) in every.items() if value}


def of_config(train: config.Train) -> Loss:
    """Cross-entropy and the terms of the config."""
    added = terms(train).values()
    return summed(lambda logps: sum((value * term(logps) for value, term in added), -logps.target))


def summed(token_loss: TokenLoss) -> Loss:
    """The sum over tokens of weight times `token_loss`, in float32.

    Positions of weight 0 cost nothing: the others are brought together first, on each device for itself. `hidden` and
    `kernel` are multiplied in their own dtype; the gradient of `kernel` is summed in float32 on each device. `weights`
    are constants, and so is all that `token_loss` reads beside Logps.
    """

    @jax.custom_vjp
    def total(hidden: Array, kernel: Array, targets: Array, weights: Array) -> Array:
        return _run(token_loss, (False, False, False), hidden, kernel, targets, weights)[0]

    def forward(*arguments: CustomVJPPrimal) -> tuple[Array, list[Any]]:
        wanted = False, arguments[0].perturbed, arguments[1].perturbed
        found, _, *gradients = _run(token_loss, wanted, *(x.value for x in arguments))
        return found, gradients

    def backward(gradients: list[Any], scale: Array) -> tuple[Any, ...]:
        return (*(None if x is None else (scale * x).astype(x.dtype) for x in gradients), None, None)

    total.defvjp(forward, backward, symbolic_zeros=True)
    return lambda hidden, kernel, batch: total(hidden, kernel, batch.targets, batch.weights)


cross_entropy = summed(lambda logps: -logps.target)


@jax.custom_vjp
def logps(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> Logps:
    """Logps of every position, for any function of them; 0 where the weight is 0, which costs nothing."""
    found = _run(lambda logps: logps.lse, (True, False, False), hidden, kernel, targets, weights)[1]
    return jax.tree.map(lambda x: jnp.where(weights != 0, x, 0), found)


def _logps_forward(*arguments: CustomVJPPrimal) -> tuple[Logps, tuple[Any, ...]]:
    values = [x.value for x in arguments]
    return logps(*values), (values, [x.perturbed or None for x in arguments[:2]])


def _logps_backward(kept: tuple[Any, ...], slopes: Logps) -> tuple[Any, ...]:
    """The gradient of the sum of slope times value, which is a loss of each token by itself."""
    (hidden, kernel, targets, weights), perturbed = kept
    used = [i for i, slope in enumerate(slopes) if not isinstance(slope, SymbolicZero)]
    _, _, *gradients = _run(
        lambda logps, *slopes: sum(slope * logps[i] for i, slope in zip(used, slopes)),
        (False, *(x is not None for x in perturbed)),
        hidden, kernel, targets, (weights != 0) + 0.0, *(jnp.where(weights != 0, slopes[i], 0) for i in used),
    )  # fmt: skip
    return *gradients, None, None


logps.defvjp(_logps_forward, _logps_backward, symbolic_zeros=True)


def _run(
    token_loss: TokenLoss, wanted: tuple[bool, bool, bool],
    hidden: Array, kernel: Array, targets: Array, weights: Array, *fields: Array,
) -> Any:  # fmt: skip
    """(weighted sum of token_loss(Logps, *fields), Logps, gradient of hidden, gradient of kernel).

    wanted: which of the last three; another is None and is not computed.
    """
    width, vocab = sharding.cuts("width", kernel.shape[0]), sharding.cuts("vocab", kernel.shape[1])
    rows = sharding.cuts("batch", hidden.shape[0]) + sharding.cuts("tokens", hidden.shape[1])
    assert set(width) <= set(rows), (width, rows)  # the batch is cut at least as far as the head's width
    to_logps, to_hidden, to_kernel = wanted

    def part(hidden: Array, kernel: Array, *fields: Array) -> tuple[Any, ...]:
        kernel = jax.lax.all_gather(kernel, width, axis=0, tiled=True) if width else kernel
        shape, flat = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
        order, count = _supervised(fields[1].reshape(-1), rows if vocab else ())
        fields = tuple(jnp.append(x.reshape(-1), jnp.zeros((1,), x.dtype)) for x in fields)

        def add(step: Array, sums: tuple[Array, Any, Any, Any]) -> tuple[Array, Any, Any, Any]:
            loss, logps, of_hidden, of_kernel = sums
            chosen = jax.lax.dynamic_slice(order, [step * chunk], [chunk])
            taken = jnp.take(flat, chosen, axis=0, mode="clip")
            (found, read), slope = _chunk(token_loss, vocab, taken, kernel, *(x[chosen] for x in fields))
            slope = slope.astype(flat.dtype)
            if to_logps:
                logps = jax.tree.map(lambda x, y: x.at[chosen].set(y, mode="drop", unique_indices=True), logps, read)
            if to_hidden:
                back = jax.lax.psum(slope @ kernel.T, vocab) if vocab else slope @ kernel.T
                of_hidden = of_hidden.at[chosen].set(back, mode="drop", unique_indices=True)
            if to_kernel:
                of_kernel += jnp.matmul(taken.T, slope, preferred_element_type=jnp.float32)
            return loss + found, logps, of_hidden, of_kernel

        chunk = min(CHUNK, len(order))
        zeros = (jnp.float32(0), Logps(*[jnp.zeros(len(flat))] * 3) if to_logps else None,
                 jnp.zeros_like(flat) if to_hidden else None,
                 jnp.zeros(kernel.shape, jnp.float32) if to_kernel else None)  # fmt: skip
        loss, logps, of_hidden, of_kernel = jax.lax.fori_loop(0, -(-count // chunk), add, zeros)
        if to_kernel:
            of_kernel = of_kernel.astype(kernel.dtype)  # devices exchange it in the dtype of all gradients
            of_kernel = sharding.reduce_scatter(of_kernel, width, 0)
            of_kernel = jax.lax.psum(of_kernel, tuple(axis for axis in rows if axis not in width))
        logps = jax.tree.map(lambda x: x.reshape(shape[:2]), logps)
        return jax.lax.psum(loss, rows), logps, of_hidden.reshape(shape) if to_hidden else None, of_kernel

    row = ("batch", "tokens")
    names = (row, ("width", "vocab"), *[row] * (2 + len(fields)))
    return sharding.per_shard(part, names, (None, 2, 0, 1))(hidden, kernel, targets, weights, *fields)


def _supervised(weights: Float[Array, "M"], shared: tuple[str, ...]) -> tuple[Int[Array, "M2"], Int[Array, ""]]:
    """The positions with a weight, in order, then the others; M fills the last chunk. And how many have a weight.

    shared: mesh axes that must agree on that number, as they meet in every chunk.
    """
    size = len(weights)
    order = jnp.argsort(weights == 0, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -size % min(CHUNK, size)), constant_values=size)
    count = jnp.sum(weights != 0)
    return order, jax.lax.pmax(count, shared) if shared else count


def _chunk(
    token_loss: TokenLoss, vocab: tuple[str, ...], hidden: Float[Array, "P D"], kernel: Float[Array, "D V"],
    targets: Int[Array, "P"], weights: Float[Array, "P"], *fields: Array,
) -> tuple[tuple[Float[Array, ""], Logps], Float[Array, "P V"]]:  # fmt: skip
    """((weighted sum, Logps), slope of the sum along the logits); V is this device's part of the vocabulary."""

    def of_logits(logits: Array) -> tuple[Array, Logps]:
        logps = _read(logits, targets, vocab)
        return jnp.sum(weights * token_loss(logps, *fields)), logps

    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jax.value_and_grad(of_logits, has_aux=True)(logits)


def _measure(logits: Array, targets: Array, vocab: tuple[str, ...]) -> tuple[Logps, tuple[Array, Array]]:
    """Logps; and for their gradient this device's part of the probabilities, and where in it the target is."""
    first = jax.lax.axis_index(vocab) * logits.shape[1] if vocab else 0
    own = (targets - first)[:, None] == jnp.arange(logits.shape[1])
    highest = jnp.max(logits, axis=-1)
    highest = jax.lax.pmax(highest, vocab) if vocab else highest
    powers = jnp.exp(logits - highest[:, None])
    total, picked = jax.lax.psum((jnp.sum(powers, axis=-1), jnp.sum(jnp.where(own, logits, 0), axis=-1)), vocab)
    lse = jnp.log(total) + highest
    mean = jax.lax.psum(jnp.sum(logits, axis=-1), vocab) / jax.lax.psum(logits.shape[1], vocab)
    return Logps(picked - lse, lse, mean - lse), (powers / total[:, None], own)


def _slope(vocab: tuple[str, ...], kept: tuple[Array, Array], slopes: Logps) -> tuple[Array, None]:
    """The slope along the logits, from those along Logps; of a field that nobody reads it is no array."""
    probabilities, own = kept
    size = jax.lax.psum(probabilities.shape[1], vocab)
    each = own - probabilities, probabilities, 1 / size - probabilities
    return sum(x[:, None] * matrix for x, matrix in zip(slopes, each) if not isinstance(x, SymbolicZero)), None


_read = jax.custom_vjp(lambda *arguments: _measure(*arguments)[0], nondiff_argnums=(2,))
_read.defvjp(lambda x, targets, vocab: _measure(x.value, targets.value, vocab), _slope, symbolic_zeros=True)
