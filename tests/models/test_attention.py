"""What `attention` computes, what it chooses to compute it with, and what it leaves out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from llava_jax import config as configs
from llava_jax import sharding
from llava_jax.batch import TREES
from llava_jax.models import attention as attentions
from llava_jax.models import flash, flash_gpu, tiled
from llava_jax.models.attention import attention, attention_by_number, cached_attention, choose
from llava_jax.plan import compilers
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


def trees(tokens: int, rows: int = 2, seed: int = 1):
    """Samples of a row, cut anywhere into a prefix and branches; some have neither."""
    rng = np.random.default_rng(seed)
    first = np.asarray(samples(tokens, rows, seed))
    branches = np.cumsum(rng.random((rows, tokens)) < 6 / tokens, axis=1)
    starts = np.maximum.accumulate(np.where(np.diff(first, axis=1, prepend=-1) != 0, branches, 0), axis=1)
    return jnp.asarray(np.where(first > 0, first + (branches - starts) * TREES, 0).astype(np.int32))


def sees(segments):
    """[B, T, S]: whether a query sees a key, by the rule as it is said."""
    tree, branch = np.asarray(segments) % TREES, np.asarray(segments) // TREES
    same = (tree[:, :, None] == tree[:, None]) & ((branch == 0)[:, None] | (branch[:, :, None] == branch[:, None]))
    return same & np.tri(tree.shape[1], dtype=bool)


@pytest.mark.parametrize("draw", [samples, trees])
def test_a_query_sees_its_own_sample_up_to_itself_and_the_prefix_of_its_tree(draw):
    q, k, v = heads(24)
    segments = np.asarray(draw(24))
    may_see = sees(segments)
    out = jax.jit(functools.partial(attention, causal=True))(q, k, v, segments=jnp.asarray(segments))
    np.testing.assert_allclose(out, by_hand(*map(np.asarray, (q, k, v)), may_see), atol=2e-6)


def test_a_cache_longer_than_the_queries_is_seen_up_to_last_key():
    q, k, v = heads(8)
    last = jnp.asarray([[3] * 8, [7] * 8])
    out = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), last)
    for row, end in ((0, 4), (1, 8)):
        whole = attention(q[row:][:1], k[row:, :end][:1], v[row:, :end][:1])
        np.testing.assert_allclose(out[row], whole[0], atol=2e-6)


def test_many_queries_of_a_cache_go_block_by_block(monkeypatch):
    q, k, v = heads(24)
    last = jnp.broadcast_to(jnp.arange(24), (2, 24))
    monkeypatch.setattr(attentions, "LONGEST_TILE", 10)
    cache = k.swapaxes(1, 2), v.swapaxes(1, 2)
    np.testing.assert_allclose(cached_attention(q, *cache, last), attention(q, k, v, causal=True), atol=2e-6)
    jaxpr = str(jax.make_jaxpr(lambda q: cached_attention(q, *cache, last))(q))
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
@pytest.mark.parametrize("causal, draw", [(True, samples), (True, trees), (True, None), (False, None)])
def test_a_row_goes_tile_by_tile_with_the_result_and_gradient_of_the_whole(monkeypatch, draw, causal, heads_of_keys):
    q, k, v = heads(40, key=heads_of_keys)
    segments = None if draw is None else draw(40)

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
    """Sample 1 of the first row, and branch 1 of the second row's tree, are no numbers; tiles, and parts of them, that
    only hold those never meet queries of others."""
    monkeypatch.setattr(flash, "TILES", (tile,))
    monkeypatch.setattr(flash, "PART", 128)
    first, rest = np.zeros((2, 2, 512), bool)
    first[0, :128] = first[1, 128:256] = True
    rest[0, 128:] = rest[1, 256:] = True
    q, k, v = (jnp.where(first[..., None, None], jnp.nan, x) for x in heads(512))
    numbers = [[1, 2, 2, 0], [1, 1 + TREES, 1 + 2 * TREES, 0]]
    segments = jnp.asarray(np.repeat(numbers, 128, axis=1), jnp.int32)
    for name in ("flash", "triton", "xla"):
        run = functools.partial(attentions.BACKENDS[name].run, True, segments=segments)
        loss = functools.partial(lambda run, *x: (jnp.sum(run(*x), where=rest[..., None, None]), run(*x)), run)
        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        for x in map(np.asarray, (out, *gradients)):
            assert np.isfinite(x[rest]).all() and np.isnan(x[first]).any(), name


@pytest.mark.parametrize("seed", range(3))
def test_the_tiles_that_are_computed_are_those_in_which_a_query_sees_a_key(seed, monkeypatch):
    monkeypatch.setattr(flash, "PART", 2)
    for numbers in (samples(24, rows=3, seed=seed), trees(24, rows=3, seed=seed)):
        pairs, ends = sees(numbers), tiled.key_ends(numbers)
        needed, halves = (pairs.reshape(3, n, size, n, size).any(axis=(2, 4)) for n, size in ((6, 4), (12, 2)))
        assert np.array_equal(tiled.visible(ends, 4, 6), needed)
        queries, keys, parts, counts = map(np.asarray, flash.visits(ends, 24, 4))
        for row, n in enumerate(counts):
            visited = list(zip(queries[row, :n].tolist(), keys[row, :n].tolist()))
            assert visited == list(map(tuple, np.argwhere(needed[row])))
            for i, j, bits in zip(queries[row, :n], keys[row, :n], parts[row, :n]):
                for number, (a, b) in enumerate(itertools.product((2 * i, 2 * i + 1), (2 * j, 2 * j + 1))):
                    assert bits >> number & 1 == halves[row, a, b]


@pytest.mark.parametrize("queries, keys", [(4, 4), (4, 2), (2, 8)])
def test_a_gpus_tiles_are_those_in_which_a_query_sees_a_key(queries, keys):
    launch = flash_gpu.FORWARD._replace(queries=queries, keys=keys)
    for numbers in (samples(24, rows=3, seed=4), trees(24, rows=3, seed=4)):
        needed = sees(numbers).reshape(3, 24 // queries, queries, 24 // keys, keys).any(axis=(2, 4))
        found = flash_gpu.seen_tiles(tiled.key_ends(numbers), launch)
        assert np.array_equal(found, needed)
        order, counts = map(np.asarray, tiled.schedule(found))
        for place, count in np.ndenumerate(counts):
            assert order[place][:count].tolist() == np.flatnonzero(needed[place]).tolist()


@pytest.mark.parametrize("tile", [128, 256])
def test_keys_of_long_rows_go_span_by_span(monkeypatch, tile):
    monkeypatch.setattr(flash, "TILES", (tile,))
    monkeypatch.setattr(flash, "PART", 128)
    q, k, v = heads(512, rows=1)
    segments = jnp.asarray(np.repeat([1, 2, 3, 3 + TREES], [150, 100, 72, 190])[None], jnp.int32)

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
    ("gpu", "triton", {}),  # cuDNN has no segments
    ("gpu", "triton", {"width": 12}),
    ("gpu", "triton", {"dtype": "float16"}),
    ("gpu", "xla", {"tokens": 192}),
    ("gpu", "xla", {"width": 136}),
    ("gpu", "xla", {"dtype": "float32"}),
    ("gpu", "cudnn", {"packed": False}),
    ("gpu", "cudnn", {"packed": False, "causal": False, "tokens": 577, "width": 64}),
    ("gpu", "cudnn", {"packed": False, "width": 88}),
    ("gpu", "triton", {"packed": False, "width": 20}),
    ("gpu", "xla", {"packed": False, "causal": False, "width": 20}),
    ("gpu", "xla", {"packed": False, "width": 136}),
    ("gpu", "xla", {"packed": False, "dtype": "float32"}),
    ("cpu", "xla", {}),
])  # fmt: skip
def test_a_backend_is_never_chosen_for_what_it_refuses(monkeypatch, platform, backend, changes):
    monkeypatch.setattr(attentions, "_is_ampere", lambda: True)
    monkeypatch.setattr(attentions, "has_cudnn", lambda: True)
    case = {"tokens": 256, "width": 128, "dtype": "bfloat16", "causal": True, "packed": True} | changes
    q = jax.ShapeDtypeStruct((2, case["tokens"], 4, case["width"]), jnp.dtype(case["dtype"]))
    assert choose(platform, q, case["causal"], case["packed"]) == backend


@pytest.mark.parametrize("capability, kernels", [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)])
def test_gpus_that_are_too_old_for_the_kernels_take_xla(monkeypatch, capability, kernels):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(attentions, "has_cudnn", lambda: True)
    for packed, backend in ((False, "cudnn"), (True, "triton")):
        q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
        assert choose("gpu", q, True, packed) == (backend if kernels else "xla")


def test_rows_without_segments_take_xla_where_cudnn_is_not_installed(monkeypatch):
    monkeypatch.setattr(attentions, "_is_ampere", lambda: True)

    def absent(*args, implementation):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", absent)
    attentions.has_cudnn.cache_clear()
    q = jax.ShapeDtypeStruct((2, 577, 16, 64), jnp.bfloat16)
    assert choose("gpu", q, False, False) == "xla"
    attentions.has_cudnn.cache_clear()


def test_rows_of_a_single_tile_need_no_loop():
    q, k, v = heads(64)
    for causal in (True, False):
        compiled = jax.jit(jax.grad(lambda q: jnp.sum(attention(q, k, v, causal=causal)))).lower(q).compile()  # noqa: B023
        assert " while(" not in compiled.as_text()


def loss(q, k, v, segments):
    return attention(q, k, v, causal=True, segments=segments).astype(jnp.float32).sum()


def shapes_on(mesh, width, query, key):
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shapes = [jax.ShapeDtypeStruct((4, 256, n, width), jnp.bfloat16, sharding=cut) for n in (query, key, key)]
    return [*shapes, jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=cut)]


@pytest.mark.parametrize("width, query, key", [(128, 8, 8), (64, 8, 2), (96, 4, 4), (12, 4, 4)])
@pytest.mark.parametrize("topology, sizes", [
    ("v5e:2x2", {"fsdp": 4}), ("v5e:2x2", {"fsdp": 2, "tensor": 2}), ("v5e:2x2", {"data": 2, "fsdp": 1, "context": 2}),
    ("v5p:2x2x1", {"fsdp": 4}), ("v6e:2x2", {"fsdp": 4}),
], ids=str)  # fmt: skip
def test_both_passes_compile_for_a_tpu_on_every_kind_of_mesh(topology, sizes, width, query, key):
    pytest.importorskip("libtpu")
    mesh = find_target(configs.Mesh(**sizes), topology).mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes_on(mesh, width, query, key)).compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text


@pytest.mark.parametrize("width, query, key", [(128, 8, 8), (64, 8, 2), (96, 4, 4)])
@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), (1, 2, 2, 1), (2, 1, 1, 2)], ids=str)
def test_both_passes_lower_for_gpus_that_are_absent_on_every_kind_of_mesh(sizes, width, query, key):
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh(sizes, sharding.AXES, (AxisType.Auto,) * 4, abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes_on(mesh, width, query, key))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(launch.name in text for launch in (flash_gpu.FORWARD, flash_gpu.OF_QUERIES, flash_gpu.OF_KEYS))


# (compute capability, multiprocessors, shared memory of one, and of a program).
# Source: github.com/openxla/xla, xla/backends/gpu/target_config/specs.
GPUS = {
    "NVIDIA A100-SXM4-80GB": ("major: 8", 108, 167936, 166912),
    "NVIDIA L4": ("major: 8 minor: 9", 58, 102400, 101376),
    "NVIDIA H100 80GB HBM3": ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 233472, 232448),
    "NVIDIA B200": ("major: 10 feature_extension: ACCELERATED_FEATURES", 148, 233472, 232448),
}


def four_gpus(kind):
    """A mesh of GPUs that need not be there."""
    if compilers.missing_packages():
        pytest.skip(f"XLA's compiler for GPUs, which needs none: pip install --no-deps {compilers.missing_packages()}")
    capability, count, shared, of_program = GPUS[kind]
    die = (f"cuda_compute_capability {{ {capability} }} core_count: {count} fpus_per_core: 128 clock_rate_ghz: 1.4 "
           f"shared_memory_per_core: {shared} shared_memory_per_block_optin: {of_program} l2_cache_size: 40000000")
    devices = compilers.absent_gpus(kind, die, 20 * 10**9, 300e9, 4)
    return sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1, "context": 1}, devices)


@pytest.mark.parametrize("kind", GPUS)
def test_kernels_compile_for_each_generation_of_gpus(monkeypatch, kind):
    monkeypatch.setattr(attentions, "_is_ampere", lambda: True)
    mesh = four_gpus(kind)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes_on(mesh, 128, 8, 2)).compile().as_text()
    assert all(launch.name in text for launch in (flash_gpu.FORWARD, flash_gpu.OF_QUERIES, flash_gpu.OF_KEYS))
    monkeypatch.setattr(flash_gpu, "FORWARD", flash_gpu.FORWARD._replace(keys=128, stages=5))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(lambda *x: loss(*x)).lower(*shapes_on(mesh, 128, 8, 2))
        with pytest.raises(jax.errors.JaxRuntimeError, match="[Ss]hared memory"):
            lowered.compile()
