"""Attention's backends, forward and backward, against an oracle in float64: what the tests and `doctor` run.

Rounding alone makes bfloat16 results differ, so the yardstick of those is a plain implementation with the same inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.batch import TREES
from llava_jax.models.attention import BACKENDS

LIMIT = 1.15  # times the plain implementation's error, in bfloat16
# cuDNN's backward pass reads the rounded output, as flash attention commonly does. The same in XLA has 1.19 times the
# plain error where queries are sharp (q x 8, 1,024 tokens).
LIMITS = {"cudnn": 1.3}
FLOAT32_LIMIT = 1e-5  # relative error
RESULTS = ("output", "dq", "dk", "dv")


class Case(NamedTuple):
    """Rows to compute. sharpness: what unit-normal queries are multiplied by; trained models have sharp weights.

    trees: packed samples share prefixes.
    """

    dtype: str = "bfloat16"
    tokens: int = 640
    width: int = 128
    heads: int = 2
    key_heads: int = 1
    packed: bool = True
    causal: bool = True
    sharpness: int = 1
    rows: int = 1
    trees: bool = False

    def __str__(self) -> str:
        mask = ("trees " if self.trees else "packed " if self.packed else "") + ("causal" if self.causal else "full")
        return (f"{self.dtype} {mask}, {self.tokens} tokens, {self.heads}/{self.key_heads} heads of {self.width}, "
                f"q x {self.sharpness}")  # fmt: skip


class Row(NamedTuple):
    """What was measured of one backend; `figure` is to be at most `limit`."""

    backend: str
    what: str
    figure: float
    limit: float


# What a chip is asked: each kind of mask, both types, sharp weights, and widths that a kernel may refuse.
CASES = (
    Case(tokens=1024, sharpness=8), Case(tokens=1024, sharpness=8, packed=False), Case(width=64, sharpness=4),
    Case(width=88, rows=2), Case(width=96, packed=False), Case(width=12),
    Case(width=64, tokens=577, packed=False, causal=False), Case("float32"), Case("float32", width=96, packed=False),
    Case(tokens=1024, width=64, trees=True),
)  # fmt: skip


def check(platform: str, cases: Sequence[Case] = CASES) -> list[Row]:
    """Each case with every backend of a platform ("tpu", "gpu", "cpu") that serves it, on the default device."""
    return [row for case in cases for row in measure(case, serving(platform, case))]


def serving(platform: str, case: Case) -> list[str]:
    """The names of the backends of a platform that serve a case."""
    q = jax.ShapeDtypeStruct((case.rows, case.tokens, case.heads, case.width), jnp.dtype(case.dtype))
    return [name for name, backend in BACKENDS.items()
            if backend.platform in (None, platform) and backend.serves(q, case.causal, case.packed)]  # fmt: skip


def measure(case: Case, backends: Sequence[str]) -> list[Row]:
    """The worst of the output and the three gradients of each backend.

    figure: for bfloat16 the relative error in units of the plain implementation's, for float32 the error itself.
    """
    q, k, v, slope, segments = inputs(case)
    mask = _mask(case, np.asarray(segments))
    truth = plain(*(np.asarray(x, np.float64) for x in (q, k, v, slope)), mask, np, np.matmul)
    rows, units = [], [1.0] * len(RESULTS)
    with jax.default_matmul_precision("highest"):  # products of float32 are float32
        if case.dtype != "float32":
            units = _errors(jax.jit(lambda *x: plain(*x, mask, jnp, _matmul))(q, k, v, slope), truth)
        for name in backends:
            errors = _errors(_results(name, case, segments if case.packed else None)(q, k, v, slope), truth)
            figures = [error / unit for error, unit in zip(errors, units)]
            limit = FLOAT32_LIMIT if case.dtype == "float32" else LIMITS.get(name, LIMIT)
            worst = int(np.argmax(figures))
            rows.append(Row(name, f"{case}: {RESULTS[worst]}", figures[worst], limit))
    return rows


def _results(backend: str, case: Case, segments: jax.Array | None) -> Callable[..., tuple[Any, ...]]:
    """Compiles to the output and the gradients of q, k and v, given those and the output's gradient."""
    run, own = BACKENDS[backend].run, () if segments is None else (segments,)

    @jax.jit
    def results(q: Any, k: Any, v: Any, slope: Any) -> tuple[Any, ...]:
        out, backward = jax.vjp(lambda q, k, v: run(case.causal, q, k, v, *own), q, k, v)
        return out, *backward(slope)

    return results


def inputs(case: Case) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k, v, the output's gradient, and segments: three samples, or trees of branches, and padding in each row."""
    rng = np.random.default_rng(0)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    arrays = [rng.normal(size=(case.rows, case.tokens, count, case.width)) for count in heads]
    arrays[0] *= case.sharpness
    ends = np.sort(rng.integers(1, case.tokens, (case.rows, 3, 1)), axis=1)
    place = np.arange(case.tokens)
    segments = np.where(place < ends[:, -1], 1 + (place >= ends).sum(axis=1), 0).astype(np.int32)
    if case.trees:
        cuts = np.sort(rng.integers(1, case.tokens, (case.rows, 9, 1)), axis=1)
        before = (cuts <= np.where(place < ends, 0, ends).max(axis=1, keepdims=True)).sum(axis=1)
        segments += TREES * ((place >= cuts).sum(axis=1) - before).astype(np.int32) * (segments > 0)
    q, k, v, slope = (jnp.asarray(x, case.dtype) for x in arrays)
    return q, k, v, slope, jnp.asarray(segments)


def plain(
    q: Any, k: Any, v: Any, slope: Any, mask: np.ndarray, numpy: Any, matmul: Callable[[Any, Any], Any]
) -> tuple[Any, Any, Any, Any]:
    """Output and gradients of whole rows, as the formulas stand: scores and sums as `matmul` makes them.

    Weights and their gradients are cast to the inputs' type once each, where products read them.
    """
    dtype, scale, group = q.dtype, q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    q, slope = (x.swapaxes(1, 2) for x in (q, slope))
    k, v = (numpy.repeat(x.swapaxes(1, 2), group, axis=1) for x in (k, v))
    scores = numpy.where(mask, matmul(q, k.mT) * scale, -numpy.inf)
    weights = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    out = matmul(weights.astype(dtype), v)
    inner = (slope * out).sum(axis=-1, keepdims=True)
    of_scores = (weights * (matmul(slope, v.mT) - inner) * scale).astype(dtype)
    of_keys, of_values = matmul(of_scores.mT, q), matmul(weights.astype(dtype).mT, slope)
    of_keys, of_values = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(axis=2) for x in (of_keys, of_values))
    results = (out, matmul(of_scores, k), of_keys, of_values)
    return tuple(x.astype(dtype).swapaxes(1, 2) for x in results)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _mask(case: Case, segments: np.ndarray) -> np.ndarray:
    mask = np.tri(case.tokens, dtype=bool) if case.causal else np.ones((case.tokens, case.tokens), bool)
    if not case.packed:
        return mask[None, None]
    of_queries, of_keys, trees = segments[:, None, :, None], segments[:, None, None], segments % TREES
    prefix = (segments == trees)[:, None, None] & (trees[:, None, :, None] == trees[:, None, None])
    return mask & ((of_queries == of_keys) | prefix)


def _errors(results: Sequence[Any], truth: Sequence[np.ndarray]) -> list[float]:
    pairs = zip((np.asarray(x, np.float64) for x in results), truth)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
