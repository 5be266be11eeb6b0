"""What `attention` computes, what it chooses to compute it with, and what it leaves out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax import config as configs
from llava_jax.models import attention as attentions
from llava_jax.models import flash, tiled
from llava_jax.models.attention import attention, attention_by_number, choose
from llava_jax.plan.compile import find_target


def heads(tokens: int, width: int = 16, rows: int = 2, query: int = 4, key: int = 2):
    rng = np.random.default_rng(0)
    shapes = [(rows, tokens, count, width) for count in (query, key, key)]
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def by_hand(q, k, v, may_see):
    """One query at a time; 0 where it sees no key."""
    out = np.zeros(q.shape, np.float32)
    for row, place, head in np.ndindex(*q.shape[:3]):
        own = np.flatnonzero(may_see[row, place])
        if own.size:
            scores = k[row, own, head // 2] @ q[row, place, head] / np.sqrt(q.shape[-1])
            shares = np.exp(scores - scores.max())
            out[row, place, head] = shares / shares.sum() @ v[row, own, head // 2]
    return out


def samples(tokens: int, rows: int = 2, seed: int = 1):
    """Three samples a row, and padding."""
    numbers = np.sort(np.random.default_rng(seed).integers(1, 5, (rows, tokens)), axis=1)
    return jnp.asarray(np.where(numbers == 4, 0, numbers).astype(np.int32))


def test_a_query_sees_its_own_sample_up_to_itself():
    q, k, v = heads(24)
    segments = np.asarray(samples(24))
    may_see = (segments[:, :, None] == segments[:, None]) & np.tri(24, dtype=bool)
    out = jax.jit(functools.partial(attention, causal=True))(q, k, v, segments=jnp.asarray(segments))
    np.testing.assert_allclose(out, by_hand(*map(np.asarray, (q, k, v)), may_see), atol=2e-6)


def test_a_cache_longer_than_the_queries_is_seen_up_to_last_key():
    q, k, v = heads(8)
    last = jnp.asarray([[3] * 8, [7] * 8])
    out = attention(q, k, v, last_key=last)
    for row, end in ((0, 4), (1, 8)):
        whole = attention(q[row:][:1], k[row:, :end][:1], v[row:, :end][:1])
        np.testing.assert_allclose(out[row], whole[0], atol=2e-6)


def test_many_queries_of_a_cache_go_block_by_block(monkeypatch):
    q, k, v = heads(24)
    last = jnp.broadcast_to(jnp.arange(24), (2, 24))
    monkeypatch.setattr(attentions, "LONGEST_TILE", 10)
    np.testing.assert_allclose(attention(q, k, v, last_key=last), attention(q, k, v, causal=True), atol=2e-6)
    jaxpr = str(jax.make_jaxpr(lambda q: attention(q, k, v, last_key=last))(q))
    assert "10,24]" in jaxpr and "24,24]" not in jaxpr, "scores of all queries at once"


def test_attention_by_number_sees_keys_of_the_same_number_a_block_of_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(tiled, "LONGEST_TILE", 8)
    (q, *_), (_, k, v) = heads(40), heads(12)
    of_queries = jnp.asarray(np.random.default_rng(2).integers(-1, 4, (2, 40)), jnp.int32)  # no key has -1
    of_keys = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32) // 3, (2, 12))
    may_see = np.asarray(of_queries)[:, :, None] == np.asarray(of_keys)[:, None]

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention_by_number(q, k, v, of_queries, of_keys)))

    def whole(q, k, v):
        scores = jnp.einsum("btkgh,bskh->btkgs", q.reshape(2, 40, 2, 2, 16), k) / 4
        weights = jnp.where(may_see[:, :, None, None], jnp.exp(scores), 0)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        return jnp.sum(jnp.sin(jnp.einsum("btkgs,bskh->btkgh", weights, v)))

    out = attention_by_number(q, k, v, of_queries, of_keys)
    np.testing.assert_allclose(out, by_hand(*map(np.asarray, (q, k, v)), may_see), atol=2e-6)
    results, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (loss, whole))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6), results, expected)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(q, k, v))
    assert "14,12]" in jaxpr and "f32[2,2,2,40,12]" not in jaxpr, "scores of all queries at once"


@pytest.mark.parametrize("heads_of_keys", [4, 2])
@pytest.mark.parametrize("causal, packed", [(True, True), (True, False), (False, False)])
def test_a_row_goes_tile_by_tile_with_the_result_and_gradient_of_the_whole(monkeypatch, packed, causal, heads_of_keys):
    q, k, v = heads(40, key=heads_of_keys)
    segments = samples(40) if packed else None

    def gradients(q, k, v):
        def loss(*x):
            return jnp.sum(jnp.sin(attention(*x, causal=causal, segments=segments)))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    expected = jax.jit(lambda *x: gradients(*x))(q, k, v)  # 40 tokens are one tile
    monkeypatch.setattr(tiled, "SHORTEST_TILE", 16)  # 40 is not a multiple of it: three tiles of 14, filled up
    monkeypatch.setattr(tiled, "LONGEST_TILE", 16 if causal else 8)
    results = jax.jit(lambda *x: gradients(*x))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=3e-6), results, expected)
    jaxpr = str(jax.make_jaxpr(gradients)(q, k, v))
    assert "14,14]" in jaxpr if causal else "14,40]" in jaxpr
    assert "40,40]" not in jaxpr, "scores of all queries at once"


@pytest.mark.parametrize("tile", [128, 256])
def test_tiles_and_their_parts_are_left_out_in_which_no_query_sees_a_key(monkeypatch, tile):
    """Sample 1 is not a number; tiles, and parts of them, that only hold it never meet queries of sample 2."""
    monkeypatch.setattr(flash, "TILES", (tile,))
    monkeypatch.setattr(flash, "PART", 128)
    q, k, v = (x.at[:, :128].set(jnp.nan) for x in heads(512, rows=1))
    segments = jnp.asarray(np.repeat([1, 2, 0], [128, 256, 128])[None], jnp.int32)
    for name in ("flash", "xla"):
        run = functools.partial(attentions.BACKENDS[name].run, True, segments=segments)
        loss = functools.partial(lambda run, *x: (jnp.sum(run(*x)[:, 128:]), run(*x)), run)
        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        for x in (out, *gradients):
            assert np.isfinite(np.asarray(x[:, 128:])).all() and np.isnan(np.asarray(x[:, :128])).any(), name


@pytest.mark.parametrize("seed", range(3))
def test_the_tiles_that_are_visited_are_those_that_share_a_sample(seed, monkeypatch):
    monkeypatch.setattr(flash, "PART", 2)
    in_order, mixed = samples(24, rows=3, seed=seed), jnp.asarray(np.random.default_rng(seed).integers(0, 9, (3, 24)))
    for numbers in (in_order, mixed):
        tiles = np.asarray(numbers).reshape(3, 6, 4)
        needed = [{(i, j) for i in range(6) for j in range(i + 1) if set(row[i]) & set(row[j])} for row in tiles]
        queries, keys, parts, counts = map(np.asarray, flash.visits(numbers, numbers, 4))
        visited = [list(zip(queries[row, :n].tolist(), keys[row, :n].tolist())) for row, n in enumerate(counts)]
        assert all(row == sorted(set(row)) for row in visited)
        assert all(a <= set(b) for a, b in zip(needed, visited))
        assert numbers is mixed or [len(a) for a in needed] == counts.tolist()
        halves = np.asarray(numbers).reshape(3, 12, 2)
        for row, n in enumerate(counts):
            for i, j, bits in zip(queries[row, :n], keys[row, :n], parts[row, :n]):
                for number, (a, b) in enumerate(itertools.product((2 * i, 2 * i + 1), (2 * j, 2 * j + 1))):
                    shares = b <= a and bool(set(halves[row, a]) & set(halves[row, b]))
                    assert bits >> number & 1 >= shares and (numbers is mixed or bits >> number & 1 == shares)


@pytest.mark.parametrize("tile", [128, 256])
def test_keys_of_long_rows_go_span_by_span(monkeypatch, tile):
    monkeypatch.setattr(flash, "TILES", (tile,))
    monkeypatch.setattr(flash, "PART", 128)
    q, k, v = heads(512, rows=1)
    segments = jnp.asarray(np.repeat([1, 2, 3], [150, 100, 262])[None], jnp.int32)

    def gradients():
        def loss(*x):
            return jnp.sum(jnp.sin(flash.flash_attention(*x, segments, True)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    whole = gradients()
    monkeypatch.setattr(flash, "SPAN_BYTES", 256 * 128 * 24)  # 256 tokens of float32
    for part, expected in zip(gradients(), whole):
        np.testing.assert_allclose(part, expected, atol=2e-6)


@pytest.mark.parametrize("platform, backend, changes", [
    ("tpu", "flash", {}),
    ("tpu", "flash", {"packed": False}),
    ("tpu", "flash", {"width": 12}),
    ("tpu", "flash", {"dtype": "float32"}),
    ("tpu", "xla", {"causal": False, "packed": False}),  # the tower
    ("tpu", "xla", {"tokens": 100}),
    ("tpu", "xla", {"dtype": "float16"}),
    ("gpu", "xla", {}),  # cuDNN has no segments
    ("gpu", "cudnn", {"packed": False}),
    ("gpu", "cudnn", {"packed": False, "causal": False, "tokens": 577, "width": 64}),
    ("gpu", "cudnn", {"packed": False, "width": 88}),
    ("gpu", "xla", {"packed": False, "width": 12}),
    ("gpu", "xla", {"packed": False, "width": 20}),
    ("gpu", "xla", {"packed": False, "width": 136}),
    ("gpu", "xla", {"packed": False, "dtype": "float32"}),
    ("cpu", "xla", {}),
])  # fmt: skip
def test_a_backend_is_never_chosen_for_what_it_refuses(monkeypatch, platform, backend, changes):
    monkeypatch.setattr(attentions, "_is_ampere", lambda: True)
    case = {"tokens": 256, "width": 128, "dtype": "bfloat16", "causal": True, "packed": True} | changes
    q = jax.ShapeDtypeStruct((2, case["tokens"], 4, case["width"]), jnp.dtype(case["dtype"]))
    assert choose(platform, q, case["causal"], case["packed"]) == backend


@pytest.mark.parametrize("capability, backend", [("9.0", "cudnn"), ("8.0", "cudnn"), ("7.5", "xla"), ("gfx942", "xla")])
def test_gpus_without_flash_in_cudnn_take_xla(monkeypatch, capability, backend):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert choose("gpu", jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16), True, False) == backend


def test_rows_of_a_single_tile_need_no_loop():
    q, k, v = heads(64)
    for causal in (True, False):
        compiled = jax.jit(jax.grad(lambda q: jnp.sum(attention(q, k, v, causal=causal)))).lower(q).compile()  # noqa: B023
        assert " while(" not in compiled.as_text()


@pytest.mark.parametrize("width, query, key", [(128, 8, 8), (64, 8, 2), (96, 4, 4), (12, 4, 4)])
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "context": 2}], ids=str
)
def test_both_passes_compile_for_a_tpu_on_every_kind_of_mesh(sizes, width, query, key):
    pytest.importorskip("libtpu")
    mesh = find_target(configs.Mesh(**sizes), "v5e:2x2").mesh
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shapes = [jax.ShapeDtypeStruct((4, 256, n, width), jnp.bfloat16, sharding=cut) for n in (query, key, key)]
    segments = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=cut)

    def loss(q, k, v, segments):
        return attention(q, k, v, causal=True, segments=segments).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, segments).compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text
