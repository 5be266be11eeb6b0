"""Cross-entropy of the supervised positions, a few at a time: the logits of a whole row never exist.

The gradient is made in the same pass as the loss, while a chunk's logits are there: making them a second time would
be a third of the head's work, and a scan's own gradient would exchange the head's between devices at every chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from llava_jax import sharding

# Positions of one device whose logits exist at once: 512 x 32,000 float32 logits are 65 MB.
CHUNK = 512


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over positions of weight times -log softmax(hidden @ kernel)[target], in float32.

    Positions of weight 0 cost nothing: the others are brought together first, on each device for itself. `hidden` and
    `kernel` are multiplied in their own dtype; the gradient of `kernel` is summed in float32 on each device. `weights`
    are constants.
    """
    return _run(hidden, kernel, targets, weights, False, False)[0]


def _forward(
    hidden: CustomVJPPrimal, kernel: CustomVJPPrimal, targets: CustomVJPPrimal, weights: CustomVJPPrimal
) -> tuple[Array, tuple[Any, Any]]:
    loss, *gradients = _run(
        hidden.value, kernel.value, targets.value, weights.value, hidden.perturbed, kernel.perturbed
    )  # fmt: skip
    return loss, tuple(gradients)


def _backward(gradients: tuple[Any, Any], scale: Array) -> tuple[Any, ...]:
    return (*(None if x is None else (scale * x).astype(x.dtype) for x in gradients), None, None)


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(hidden: Array, kernel: Array, targets: Array, weights: Array, to_hidden: bool, to_kernel: bool) -> Any:
    """(loss, gradient of hidden, gradient of kernel); a gradient that nobody wants is None and is not computed."""
    width, vocab = sharding.cuts("width", kernel.shape[0]), sharding.cuts("vocab", kernel.shape[1])
    rows = sharding.cuts("batch", hidden.shape[0]) + sharding.cuts("tokens", hidden.shape[1])
    assert set(width) <= set(rows), (width, rows)  # the batch is cut at least as far as the head's width

    def part(hidden: Array, kernel: Array, targets: Array, weights: Array) -> tuple[Any, ...]:
        kernel = jax.lax.all_gather(kernel, width, axis=0, tiled=True) if width else kernel
        shape, flat = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
        order, count = _supervised(weights.reshape(-1), rows if vocab else ())
        targets, weights = (jnp.append(x.reshape(-1), jnp.zeros((1,), x.dtype)) for x in (targets, weights))

        def add(step: Array, sums: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
            loss, of_hidden, of_kernel = sums
            chosen = jax.lax.dynamic_slice(order, [step * chunk], [chunk])
            taken = jnp.take(flat, chosen, axis=0, mode="clip")
            found, slope = _chunk(taken, kernel, targets[chosen], weights[chosen], vocab)
            slope = slope.astype(flat.dtype)
            if to_hidden:
                back = jax.lax.psum(slope @ kernel.T, vocab) if vocab else slope @ kernel.T
                of_hidden = of_hidden.at[chosen].set(back, mode="drop", unique_indices=True)
            if to_kernel:
                of_kernel += jnp.matmul(taken.T, slope, preferred_element_type=jnp.float32)
            return loss + found, of_hidden, of_kernel

        chunk = min(CHUNK, len(order))
        zeros = (jnp.float32(0), jnp.zeros_like(flat) if to_hidden else None,
                 jnp.zeros(kernel.shape, jnp.float32) if to_kernel else None)  # fmt: skip
        loss, of_hidden, of_kernel = jax.lax.fori_loop(0, -(-count // chunk), add, zeros)
        if to_kernel:
            of_kernel = of_kernel.astype(kernel.dtype)  # devices exchange it in the dtype of all gradients
            of_kernel = jax.lax.psum_scatter(of_kernel, width, tiled=True) if width else of_kernel
            of_kernel = jax.lax.psum(of_kernel, tuple(axis for axis in rows if axis not in width))
        return jax.lax.psum(loss, rows), of_hidden.reshape(shape) if to_hidden else None, of_kernel

    names = (("batch", "tokens"), ("width", "vocab"), ("batch", "tokens"), ("batch", "tokens"))
    return sharding.per_shard(part, names, (None, 0, 1))(hidden, kernel, targets, weights)


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
    hidden: Float[Array, "P D"], kernel: Float[Array, "D V"], targets: Int[Array, "P"], weights: Float[Array, "P"],
    vocab: tuple[str, ...],
) -> tuple[Float[Array, ""], Float[Array, "P V"]]:  # fmt: skip
    """(weighted sum of losses, its slope along the logits); V is this device's part of the vocabulary."""
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    first = jax.lax.axis_index(vocab) * kernel.shape[1] if vocab else 0
    own = (targets - first)[:, None] == jnp.arange(kernel.shape[1])
    highest = jnp.max(logits, axis=-1)
    highest = jax.lax.pmax(highest, vocab) if vocab else highest
    powers = jnp.exp(logits - highest[:, None])
    total, picked = jnp.sum(powers, axis=-1), jnp.sum(jnp.where(own, logits, 0), axis=-1)
    if vocab:
        total, picked = jax.lax.psum((total, picked), vocab)
    loss = jnp.sum(weights * (jnp.log(total) + highest - picked))
    return loss, weights[:, None] * (powers / total[:, None] - own)
