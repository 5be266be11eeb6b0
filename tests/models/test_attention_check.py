"""Every backend of attention, forward and backward, against the float64 oracle; and the oracle's own power to see."""

import jax
import jax.numpy as jnp
import pytest

from llava_jax.models import attention as attentions
from llava_jax.models import attention_check
from llava_jax.models.attention_check import Case, check, measure, serving

MATRIX = [
    Case(width=128, heads=4, key_heads=2, sharpness=8),
    Case(width=96, packed=False, sharpness=4),
    Case(width=12, heads=3, key_heads=3),
    Case(tokens=650, width=88),  # no multiple of any tile
    Case(tokens=577, width=64, packed=False, causal=False),
    Case("float32", width=64, rows=2),
    Case("float32", tokens=768, width=64, rows=2, trees=True),
    Case("float16", tokens=768, width=32, heads=4, key_heads=2, sharpness=4, trees=True),
]
SLOW = [
    Case(width=128, sharpness=8, packed=False),
    Case(width=64, sharpness=4, rows=2),
    Case(width=88, sharpness=8),
    Case(width=20, packed=False),
    Case(tokens=1152, width=64),  # tiles of 384 in the kernel
    Case("float32", width=128, heads=4, key_heads=2),
    Case("float32", width=88, packed=False),
    Case("float32", width=12),
    Case(tokens=2048, width=128, sharpness=4),
    Case(tokens=4096, width=128, sharpness=8),
    Case(tokens=4096, width=64, heads=1, packed=False),
    Case("float32", tokens=4096, width=64, heads=1),
    Case(tokens=1152, width=88, sharpness=8, trees=True),
    Case("float32", tokens=4096, width=64, heads=2, trees=True),
]


@pytest.mark.parametrize("case", [*MATRIX, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_a_backend_is_as_exact_as_float32_scores_and_sums_allow(monkeypatch, case):
    monkeypatch.setattr(attentions, "_is_ampere", lambda: True)
    backends = {name for platform in ("cpu", "tpu", "gpu") for name in serving(platform, case)}
    if case.dtype == "float32" and case.causal:
        backends.add("triton")  # a GPU is not asked for it; here it shows what rounding may hide
    rows = measure(case, sorted(backends - {"cudnn"}))
    assert rows and not [row for row in rows if not row.figure <= row.limit], rows


@pytest.mark.parametrize("backend", ["cudnn", "triton"])
def test_kernels_on_a_gpu(backend):
    if jax.default_backend() != "gpu":
        pytest.skip(f"{backend}: this machine has no GPU")
    rows = [row for row in check("gpu") if row.backend == backend]
    assert rows and not [row for row in rows if not row.figure <= row.limit], rows


def test_each_platform_s_kernel_is_checked_where_it_serves(monkeypatch):
    monkeypatch.setattr(attentions, "_is_ampere", lambda: True)
    asked = [case for case in attention_check.CASES if case.packed and case.dtype == "bfloat16"]
    assert len(asked) > 3 and all(serving("gpu", case) == ["triton", "xla"] for case in asked)
    assert serving("tpu", Case()) == ["flash", "xla"]
    assert serving("tpu", Case(tokens=577)) == serving("cpu", Case()) == ["xla"]
    (row,) = check("cpu", [Case(tokens=128, width=16)])
    assert row.backend == "xla" and row.what.startswith("bfloat16 packed causal, 128 tokens, 2/1 heads of 16, q x 1: ")


def rounded_queries(causal, q, k, v, segments=None):
    """As splash attention has it: queries that are scaled before the product, and rounded."""
    return attentions._xla(causal, q * q.shape[3] ** -0.5, k * q.shape[3] ** 0.5, v, segments)


def rounded_sums(causal, q, k, v, segments=None):
    """Gradients of keys and values that are summed over blocks of queries in their own type."""
    blocks = [attentions.tiled_attention(False, block, k, v) for block in jnp.split(q, 8, axis=1)]
    return jnp.concatenate(blocks, axis=1)


@pytest.mark.parametrize("fault, case", [
    (rounded_queries, Case(sharpness=8, packed=False)),
    (rounded_sums, Case(tokens=1024, width=64, packed=False, causal=False)),
])  # fmt: skip
def test_what_the_review_found_in_older_kernels_is_over_the_limit(monkeypatch, fault, case):
    broken = attentions.BACKENDS["xla"]._replace(run=fault)
    monkeypatch.setitem(attention_check.BACKENDS, "xla", broken)
    (row,) = measure(case, ["xla"])
    assert row.figure > row.limit, row
