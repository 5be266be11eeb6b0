"""One function for all attention, and the choice of what computes it. Scores and softmax are float32.

Causal rows take Pallas kernels on TPU (`models.flash`); on GPU rows without segments take cuDNN's, other causal ones
Pallas kernels of Triton (`models.flash_gpu`). All else is plain XLA (`models.tiled`). `models.attention_check` compares
each with an oracle.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax import chips, sharding
from llava_jax.models.remat import ATTENTION, named
from llava_jax.models.tiled import LONGEST_TILE, NEVER, key_ends, tiled_attention

FLASH_TILE = 128  # rows that are no multiple of it are left to XLA; `flash.LANES`, the longest tile of `flash_gpu`


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    segments: Int[Array, "B T"] | None = None,
    rows: str = "batch",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v with grouped heads: query head n reads key head n // (N / K).

    Args:
      causal: queries and keys are the same row, and a query sees no later key.
      segments: of one row that is both queries and keys, as in a `Batch`; a query sees only keys of its own sample, and
        of its tree's prefix where rows are causal.
      rows: the logical name of the first dimension.

    Returns: [B, T, N, H] in the dtype of `v`.
    """
    names = (rows, None, "heads" if rows == "batch" else None)
    q, k, v = (sharding.constrain(x, *names) for x in (q, k, v))
    arguments = [names, names, names]
    if segments is not None:
        arguments.append((rows,))
    if causal and sharding.cuts("heads", q.shape[2]) != sharding.cuts("heads", k.shape[2]):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # each part takes its own heads along
    run = BACKENDS[choose(sharding.platform(), q, causal, segments is not None)].run
    own = [q, k, v] if segments is None else [q, k, v, segments]
    return sharding.per_shard(functools.partial(run, causal), arguments, 0)(*own)


def attention_by_number(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    of_queries: Int[Array, "B T"],
    of_keys: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """Attention of each query to the keys that have its own number; 0 for a query whose number no key has."""
    out = tiled_attention(False, q, k, v, (of_queries, of_keys))
    any_key = (of_queries[..., None] == of_keys[:, None]).any(axis=-1)
    return jnp.where(any_key[..., None, None], out, 0)


def cached_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], last_key: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """As `attention`, to the keys of a cache: each query sees those up to its last one, an index of S."""
    starts = range(0, q.shape[1], LONGEST_TILE)  # the scores of many queries at once would fill the memory
    parts = [_cached(x, k, v, last) for x, last in
             ((q[:, i : i + LONGEST_TILE], last_key[:, i : i + LONGEST_TILE]) for i in starts)]  # fmt: skip
    return jnp.concatenate(parts, axis=1)


def _cached(q: Array, k: Array, v: Array, last_key: Array) -> Array:
    rows, tokens, heads, width = q.shape
    grouped = q.reshape(rows, tokens, k.shape[1], heads // k.shape[1], width)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    seen = jnp.arange(k.shape[2]) <= last_key[..., None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, NEVER), axis=-1).astype(v.dtype)
    # In this order: XLA on a CPU has no bfloat16 product whose result is transposed (findings/xla_cpu_bf16_product.sh).
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32)
    return jnp.moveaxis(out, 3, 1).astype(v.dtype).reshape(q.shape)


def _flash(causal: bool, q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    from llava_jax.models.flash import flash_attention  # Pallas takes a quarter of a second to import

    assert causal
    return flash_attention(q, k, v, segments, interpret=sharding.platform() != "tpu")


def _cudnn(causal: bool, q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    assert segments is None
    return named(jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn"), ATTENTION)


def _triton(causal: bool, q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    from llava_jax.models.flash_gpu import flash_attention

    assert causal
    return flash_attention(q, k, v, segments, interpret=sharding.platform() != "gpu")


def _xla(causal: bool, q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    numbers = None if segments is None else key_ends(segments) if causal else (segments, segments)
    return tiled_attention(causal, q, k, v, numbers)


class Backend(NamedTuple):
    """One way to compute the attention of rows.

    platform: where it runs; None: everywhere.
    serves: whether it can: called with q (or its shape and dtype), causal, and whether the rows are packed.
    run: called with causal, q, k, v and, where rows are packed, segments.
    """

    platform: str | None
    serves: Callable[[Any, bool, bool], bool]
    run: Callable[..., Array]


def _flash_serves(q: Any, causal: bool, packed: bool) -> bool:
    return causal and q.shape[1] % FLASH_TILE == 0 and q.dtype in (jnp.bfloat16, jnp.float32)


def _cudnn_serves(q: Any, causal: bool, packed: bool) -> bool:
    """cuDNN has no segments: packed rows would want a dense mask of [T, T], which is what flash is there to avoid.

    Source: jax/_src/cudnn/fused_attention_stablehlo.py, check_layout and check_is_flash_attention (0.10.2, 0.12.0.1).
    """
    width = q.shape[3]
    halves = q.dtype in (jnp.bfloat16, jnp.float16)
    return not packed and halves and width % 8 == 0 and width <= 128 and _is_ampere() and has_cudnn()


def _triton_serves(q: Any, causal: bool, packed: bool) -> bool:
    """Products of float32 would take no tensor cores, and tiles of theirs or of wider heads more than shared memory."""
    halves = q.dtype in (jnp.bfloat16, jnp.float16)
    return causal and q.shape[1] % FLASH_TILE == 0 and halves and q.shape[3] <= 128 and _is_ampere()


def _is_ampere() -> bool:
    """Whether the GPUs are NVIDIA's of compute capability 8.0 or later: flash kernels have no tiles for older ones."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and chips.of_kind(mesh.abstract_device.device_kind):
        return True  # as all of that table, also where none is attached
    major = jax.local_devices()[0].compute_capability.split(".")[0]  # "9.0"; AMD's are called "gfx942"
    return major.isdigit() and int(major) >= 8


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX finds cuDNN: always beside a GPU, but not everywhere that `plan` compiles for one."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except RuntimeError:  # "cuDNN is not detected."
        return False
    return True


BACKENDS = {
    "flash": Backend("tpu", _flash_serves, _flash),
    "cudnn": Backend("gpu", _cudnn_serves, _cudnn),
    "triton": Backend("gpu", _triton_serves, _triton),
    "xla": Backend(None, lambda q, causal, packed: True, _xla),
}


def choose(platform: str, q: Any, causal: bool, packed: bool) -> str:
    """The backend of rows with queries like `q`: the first of `BACKENDS` that runs there and serves them."""
    return next(name for name, backend in BACKENDS.items()
                if backend.platform in (None, platform) and backend.serves(q, causal, packed))  # fmt: skip
