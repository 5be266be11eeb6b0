"""From logits to the next id: greedy, or drawn at a temperature from the top k ids and the top p of the mass.

The noise of a draw depends on the request's seed and the token's position alone, never on its batch or slot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llava_jax.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How one request's ids are drawn. The default is greedy; `top_k` 0 and `top_p` 1 cut nothing.

    As in transformers the repetition penalty comes first (1: none; greedy ids heed it too), then the temperature, then
    `top_k`, then `top_p` of what is left.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature={self.temperature}: want a number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: want 0 < top_p <= 1 (1 cuts nothing)")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k}: want at least 0 (0 cuts nothing)")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed={self.seed}: want 0 <= seed < 2**32")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(f"repetition_penalty={self.repetition_penalty}: want a number above 0 (1 changes nothing)")


class SamplingRows(NamedTuple):
    """`Sampling` of every slot, as arrays."""

    temperature: Float[Array | np.ndarray, "S"]
    top_p: Float[Array | np.ndarray, "S"]
    top_k: Int[Array | np.ndarray, "S"]
    seed: Int[Array | np.ndarray, "S"]
    repetition_penalty: Float[Array | np.ndarray, "S"]


def stack(samplings: Sequence[Sampling]) -> SamplingRows:
    """The rows of a batch, on the host."""
    return SamplingRows(
        temperature=np.array([s.temperature for s in samplings], np.float32),
        top_p=np.array([s.top_p for s in samplings], np.float32),
        top_k=np.array([s.top_k for s in samplings], np.int32),
        seed=np.array([s.seed for s in samplings], np.uint32),
        repetition_penalty=np.array([s.repetition_penalty for s in samplings], np.float32),
    )


def penalized(
    logits: Float[Array, "S V"], seen: Bool[Array, "S V"], penalty: Float[Array, "S"]
) -> Float[Array, "S V"]:
    """The logits, those of the ids that a row has seen made less likely: divided by its penalty, or times it below 0.

    Source: transformers 5.24 RepetitionPenaltyLogitsProcessor; what is seen are the prompt's ids and the answer's.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def next_ids(
    logits: Float[Array, "S V"], positions: Int[Array, "S"], sampling: SamplingRows
) -> Int[Array, "S"]:
    """The id at `positions` for every row, from float32 logits. Greedy ties go to the smaller id."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, "S"]:
        drawn = jax.vmap(_draw)(logits, positions, sampling)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    # Sorting a whole vocabulary costs more than a small model's step: greedy batches never run it.
    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def _draw(logits: Float[Array, "V"], position: Int[Array, ""], sampling: SamplingRows) -> Int[Array, ""]:
    """One row's draw by the Gumbel trick, over the ids that `top_k` and `top_p` leave."""
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    order = jnp.argsort(logits, descending=True, stable=True)
    ranked = logits[order] / temperature
    noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(sampling.seed), position), logits.shape)
    kept = kept_ranks(ranked, sampling.top_k, sampling.top_p)
    return order[jnp.argmax(jnp.where(kept, ranked + noise[order], -jnp.inf))].astype(jnp.int32)


def kept_ranks(
    ranked: Float[Array, "V"], top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Array:
    """Bool [V]: which of the logits, given in falling order, may be drawn; the first always may.

    An id stays when the mass of the ids before it, among the top k, is below `top_p`.
    """
    rank = jnp.arange(ranked.shape[0])
    in_k = (top_k <= 0) | (rank < top_k)
    mass = jax.nn.softmax(jnp.where(in_k, ranked, -jnp.inf))
    before = jnp.cumsum(mass) - mass
    return in_k & ((top_p >= 1) | (before < top_p) | (rank == 0))
