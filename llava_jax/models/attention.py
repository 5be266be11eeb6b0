"""One function for all attention, and the kernels behind it. Scores and softmax are float32; segments never mix.

On TPU whole rows go through splash attention (Pallas), on GPU through cuDNN where it can express the mask. All else
is plain XLA, which is also what the kernels are tested against; it takes long rows a block of queries at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from llava_jax import sharding
from llava_jax.models.remat import ATTENTION, named

_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without any key gives no NaN

# Queries whose scores exist at once in XLA, of a row's eighth: a row of 4,096 and 32 heads has 2.1 GB of scores.
SHORTEST_BLOCK, LONGEST_BLOCK = 128, 512

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    last_key: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    rows: str = "batch",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v with grouped heads: query head n reads key head n // (N / K).

    Args:
      causal: queries and keys are the same row, and a query sees no later key.
      last_key: the last key index that each query may see, for keys in a cache; None lets it see all.
      segments: sample numbers of one row that is both queries and keys; a query sees only keys of its own number.
      rows: the logical name of the first dimension.

    Returns: [B, T, N, H] in the dtype of `v`.
    """
    if last_key is not None:
        return _xla(q, k, v, last_key, None)
    names = (rows, None, "heads" if rows == "batch" else None)
    q, k, v = (sharding.constrain(x, *names) for x in (q, k, v))
    arguments = [names, names, names]
    if segments is not None:
        arguments.append((rows,))
    if causal and sharding.cuts("heads", q.shape[2]) != sharding.cuts("heads", k.shape[2]):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # each part takes its own heads along
    kernel = _kernel(q, k, causal, segments is not None)
    own = [q, k, v] if segments is None else [q, k, v, segments]
    return sharding.per_shard(kernel, arguments, 0)(*own)


def attention_by_number(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    of_queries: Int[Array, "B T"],
    of_keys: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """Attention of each query to the keys that have its own number; 0 for a query whose number no key has."""
    found = _xla(q, k, v, None, (of_queries, of_keys))
    any_key = (of_queries[..., None] == of_keys[:, None]).any(axis=-1)
    return jnp.where(any_key[..., None, None], found, 0)


def _kernel(q: Array, k: Array, causal: bool, packed: bool) -> Callable[..., Array]:
    """What computes one device's part: called with q, k, v and, where rows are packed, segments."""
    platform = sharding.platform()
    if platform == "tpu" and causal and q.shape[1] % 128 == 0 and q.shape[3] % 128 == 0:
        return _splash
    # cuDNN has no segments: packed rows would want a dense mask of [T, T], which is what flash is there to avoid.
    if platform == "gpu" and not packed and q.dtype != jnp.float32 and q.shape[3] <= 128:
        return functools.partial(_cudnn, causal)
    return functools.partial(_blocks, causal)


def _cudnn(causal: bool, q: Array, k: Array, v: Array) -> Array:
    return named(jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn"), ATTENTION)


def _splash(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    tokens, heads, width = q.shape[1:]
    block = next(size for size in (512, 384, 256, 128) if tokens % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, residual_checkpoint_name=ATTENTION)
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    found = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)
    return found.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(causal: bool, q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """XLA's attention of rows with themselves, a block of queries at a time, against the keys that it can see.

    The backward pass makes the weights again from the sums that are kept, as flash attention does: scores never
    outlive their block, and nothing is computed for keys behind a causal block.
    """
    return _blocks_forward(causal, q, k, v, segments)[0]


def _blocks_forward(causal: bool, q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Any]:
    queries, keys, values = (
        named(x, ATTENTION) for x in (_grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2))
    )
    parts = []
    for own, seen in _spans(q.shape[1], causal):
        scores = _block_scores(queries, keys, segments, own, seen, causal)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        found = jnp.einsum(
            "bkgts,bksh->bkgth", weights.astype(v.dtype), values[:, :, seen], preferred_element_type=jnp.float32
        )
        parts.append(((found / total).astype(v.dtype), top + jnp.log(total)))
    out, sums = (named(jnp.concatenate(some, axis=3), ATTENTION) for some in zip(*parts))
    return _ungrouped(out), (queries, keys, values, segments, out, sums)


def _blocks_backward(causal: bool, kept: Any, slope: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, values, segments, out, sums = kept
    slope = _grouped(slope, keys.shape[1])
    inner = (slope * out).sum(-1, keepdims=True, dtype=jnp.float32)
    of_queries, of_keys, of_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    for own, seen in _spans(queries.shape[3], causal):
        scores = _block_scores(queries, keys, segments, own, seen, causal)
        weights = jnp.exp(scores - sums[..., own, :])
        of_weights = _scores(slope[..., own, :], values[:, :, seen])
        of_scores = (weights * (of_weights - inner[..., own, :]) * queries.shape[-1] ** -0.5).astype(keys.dtype)
        of_queries.append(jnp.einsum("bkgts,bksh->bkgth", of_scores, keys[:, :, seen]))
        slopes = jnp.einsum("bkgts,bkgth->bksh", of_scores, queries[..., own, :])
        of_keys = of_keys.at[:, :, seen].add(slopes)
        slopes = jnp.einsum("bkgts,bkgth->bksh", weights.astype(slope.dtype), slope[..., own, :])
        of_values = of_values.at[:, :, seen].add(slopes)
    of_queries = _ungrouped(jnp.concatenate(of_queries, axis=3))
    return of_queries, of_keys.swapaxes(1, 2), of_values.swapaxes(1, 2), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _spans(tokens: int, causal: bool) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys that they can see: short blocks pay where keys are left out."""
    most = min(LONGEST_BLOCK, max(SHORTEST_BLOCK, tokens // 8)) if causal else 2 * LONGEST_BLOCK
    blocks = -(-tokens // most)
    ends = [tokens * i // blocks for i in range(blocks + 1)]
    return [(slice(start, end), slice(0, end if causal else None)) for start, end in zip(ends, ends[1:])]


def _grouped(x: Array, groups: int) -> Array:
    """[B, T, N, H] -> [B, K, N / K, T, H]"""
    return jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, x.shape[3]), 1, 3)


def _ungrouped(x: Array) -> Array:
    rows, groups, heads, tokens, width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(rows, tokens, groups * heads, width)


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)


def _block_scores(q: Array, k: Array, segments: Array | None, own: slice, seen: slice, causal: bool) -> Array:
    scores = _scores(q[..., own, :], k[:, :, seen]) * q.shape[-1] ** -0.5
    order = jnp.arange(own.start, own.stop)[None] if causal else None
    mask = _seen(k[:, :, seen].shape[2], order, None if segments is None else (segments[:, own], segments[:, seen]))
    return scores if mask is None else jnp.where(mask[:, None, None], scores, _NEVER)


def _xla(q: Array, k: Array, v: Array, last_key: Array | None, segments: Segments | None) -> Array:
    rows, tokens, heads, width = q.shape
    grouped = q.reshape(rows, tokens, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    seen = _seen(k.shape[1], last_key, segments)
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, _NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _seen(keys: int, last_key: Array | None, segments: Segments | None) -> Array | None:
    seen = None
    if last_key is not None:
        seen = jnp.arange(keys) <= last_key[..., None]
    if segments is not None:
        same = segments[0][..., None] == segments[1][:, None]
        seen = same if seen is None else seen & same
    return seen
