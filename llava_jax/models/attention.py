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

_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without any key gives no NaN

# Queries whose scores exist at once in XLA: a row of 4,096 and 32 heads would be 2.1 GB of float32 scores.
QUERY_BLOCK = 512
LONG = 2 * QUERY_BLOCK

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


def _kernel(q: Array, k: Array, causal: bool, packed: bool) -> Callable[..., Array]:
    """What computes one device's part: called with q, k, v and, where rows are packed, segments."""
    platform = sharding.platform()
    if platform == "tpu" and causal and q.shape[1] % 128 == 0 and q.shape[3] % 128 == 0:
        return _splash
    # cuDNN has no segments: packed rows would want a dense mask of [T, T], which is what flash is there to avoid.
    if platform == "gpu" and not packed and q.dtype != jnp.float32 and q.shape[3] <= 128:
        return functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    return functools.partial(_whole_rows, causal)


def _splash(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    tokens, heads, width = q.shape[1:]
    block = next(size for size in (512, 384, 256, 128) if tokens % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    found = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)
    return found.swapaxes(1, 2)


def _whole_rows(causal: bool, q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """XLA's attention of rows with themselves; a long row goes block by block, each computed again backwards."""
    order = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]) if causal else None
    if q.shape[1] <= LONG:
        return _xla(q, k, v, order, None if segments is None else (segments, segments))

    def block(part: tuple[Any, ...]) -> Array:
        q, order, own = part
        return _xla(q, k, v, order, None if segments is None else (own, segments))

    rows, tokens = q.shape[:2]
    q, order, own = jax.tree.map(_in_blocks, (q, order, segments))
    found = jax.lax.map(jax.checkpoint(block, prevent_cse=False), (q, order, own))
    return jnp.moveaxis(found, 0, 1).reshape(rows, -1, *found.shape[3:])[:, :tokens]


def _in_blocks(x: Array) -> Array:
    """[B, T, ...] -> [blocks, B, QUERY_BLOCK, ...], zeros after the last query."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % QUERY_BLOCK)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)


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
