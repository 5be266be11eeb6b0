"""The kernels behind `attention`, each against the plain one, and what cuts them on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import attention as room
from llava_jax.models.attention import attention


def heads(tokens: int, width: int = 16, rows: int = 2, query: int = 4, key: int = 2):
    rng = np.random.default_rng(0)
    shapes = [(rows, tokens, count, width) for count in (query, key, key)]
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def by_hand(q, k, v, segments):
    """One query at a time."""
    out = np.zeros(q.shape, np.float32)
    for row, place, head in np.ndindex(*q.shape[:3]):
        own = np.flatnonzero(segments[row, : place + 1] == segments[row, place])
        scores = k[row, own, head // 2] @ q[row, place, head] / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max())
        out[row, place, head] = shares / shares.sum() @ v[row, own, head // 2]
    return out


def three_samples(tokens: int):
    return jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (2, tokens)), axis=1).astype(np.int32))


def test_a_query_sees_its_own_sample_up_to_itself():
    q, k, v = heads(24)
    segments = three_samples(24)
    found = attention(q, k, v, causal=True, segments=segments)
    np.testing.assert_allclose(found, by_hand(*map(np.asarray, (q, k, v, segments))), atol=2e-6)


def test_a_cache_longer_than_the_queries_is_seen_up_to_last_key():
    q, k, v = heads(8)
    last = jnp.asarray([[3] * 8, [7] * 8])
    found = attention(q, k, v, last_key=last)
    for row, end in ((0, 4), (1, 8)):
        whole = attention(q[row:][:1], k[row:, :end][:1], v[row:, :end][:1])
        np.testing.assert_allclose(found[row], whole[0], atol=2e-6)


@pytest.mark.parametrize("heads_of_keys", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [False, True])
def test_a_row_goes_block_by_block_with_the_result_and_gradient_of_the_whole(
    monkeypatch, segments, causal, heads_of_keys
):
    q, k, v = heads(40, key=heads_of_keys)
    own = three_samples(40) if segments else None
    order = jnp.broadcast_to(jnp.arange(40), (2, 40)) if causal else None
    monkeypatch.setattr(room, "SHORTEST_BLOCK", 16)  # 40 is not a multiple of it: blocks of 13, 13 and 14
    monkeypatch.setattr(room, "LONGEST_BLOCK", 16 if causal else 8)

    def blocks(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, causal=causal, segments=own)))

    def whole(q, k, v):
        return jnp.sum(jnp.sin(room._xla(q, k, v, order, None if own is None else (own, own))))

    found, wanted = (jax.value_and_grad(f, (0, 1, 2))(q, k, v) for f in (blocks, whole))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=3e-6), found, wanted)
    jaxpr = str(jax.make_jaxpr(jax.grad(blocks))(q, k, v))
    assert "14,40]" in jaxpr and "40,40]" not in jaxpr, "scores of all queries at once"
    assert ("13,13]" in jaxpr) == causal, "a causal block sees no key behind it"


def test_blocks_in_bfloat16_are_as_near_to_float32_as_the_plain_attention():
    full = heads(256, width=64)
    half = [x.astype(jnp.bfloat16) for x in full]
    order = jnp.broadcast_to(jnp.arange(256), (2, 256))
    truth, plain = (room._xla(*some, order, None).astype(jnp.float32) for some in (full, half))
    error, of_plain = (jnp.linalg.norm(x - truth) for x in (attention(*half, causal=True).astype(jnp.float32), plain))
    assert error <= 1.05 * of_plain


def test_splash_is_plain_attention(monkeypatch):
    """The Pallas kernel, interpreted: this machine has no TPU to run it on."""
    q, k, v = heads(256, width=128)
    segments = three_samples(256)
    make = room.splash.make_splash_mha_single_device
    monkeypatch.setattr(room.splash, "make_splash_mha_single_device", functools.partial(make, interpret=True))
    found = room._splash(q, k, v, segments)
    np.testing.assert_allclose(found, room._blocks(True, q, k, v, segments), atol=2e-5)


def test_on_a_tpu_whole_causal_rows_take_splash_and_on_a_gpu_only_unpacked_rows_take_flash(monkeypatch):
    q, k, _ = (x.astype(jnp.bfloat16) for x in heads(256, width=128))
    short = q[:, :100]
    monkeypatch.setattr(room.sharding, "platform", lambda: "tpu")
    assert room._kernel(q, k, True, True) is room._splash
    assert room._kernel(q, k, False, False) is not room._splash  # the tower: 577 patches of width 64
    assert room._kernel(short, k, True, True) is not room._splash
    monkeypatch.setattr(room.sharding, "platform", lambda: "gpu")
    assert room._kernel(q, k, True, False).func is room._cudnn
    assert room._kernel(q, k, True, True).func is room._blocks
    assert room._kernel(q.astype(jnp.float32), k, True, False).func is room._blocks
