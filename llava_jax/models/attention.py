"""One function for all attention. Scores and softmax are float32; segments never see each other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without any key gives no NaN


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    last_key: Int[Array, "B T"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v with grouped heads: query head n reads key head n // (N / K).

    Args:
      last_key: the last key index that each query may see (causal order); None lets it see all.
      segments: sample numbers of queries and keys; a query sees only keys of its own number.

    Returns: [B, T, N, H] in the dtype of `v`.
    """
    rows, tokens, heads, width = q.shape
    grouped = q.reshape(rows, tokens, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    seen = _seen(k.shape[1], last_key, segments)
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, _NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _seen(keys: int, last_key: Array | None, segments: tuple[Array, Array] | None) -> Array | None:
    seen = None
    if last_key is not None:
        seen = jnp.arange(keys) <= last_key[..., None]
    if segments is not None:
        same = segments[0][..., None] == segments[1][:, None]
        seen = same if seen is None else seen & same
    return seen
