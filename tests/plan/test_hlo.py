"""Work and traffic read from compiled programs whose FLOPs and bytes are known exactly, on CPU and for TPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax import config as configs
from llava_jax.models.attention import attention
from llava_jax.models.layers import Dense
from llava_jax.plan import hlo
from llava_jax.plan.compile import find_target

ROOT = Path(__file__).parents[2]
X, W = jax.ShapeDtypeStruct((128, 256), jnp.float32), jax.ShapeDtypeStruct((5, 256, 256), jnp.float32)
PRODUCT = 2 * 128 * 256 * 256


def layers(x, stack, wrap=lambda body: body):
    return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, stack)[0]


def nested(x, stack):
    return jax.lax.fori_loop(0, 3, lambda _, x: layers(x, stack), x)


def gradient(x, stack):
    return jax.grad(lambda stack: layers(x, stack, jax.checkpoint).sum())(stack)


def either(flag, x, stack):
    return jax.lax.cond(flag > 0, lambda: layers(x, stack), lambda: x @ stack[0])


def as_data_says(count, x, stack):
    return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ stack[0]), x)


def heads(q, k):
    return jnp.einsum("bqnh,bknh->bnqk", q, k)


@pytest.fixture(scope="module")
def mesh():
    """Eight chips that are not here."""
    pytest.importorskip("libtpu")
    return find_target(configs.Mesh(), "v5e:2x4").mesh


def on_cpu(function, *shapes, **options):
    return hlo.cost(jax.jit(function).lower(*shapes).compile().as_text(), **options)


def on_tpu(mesh, function, *shapes, axes=(), **options):
    """The cost for eight chips; `axes`: the mesh axes of the arguments' first dimension, () for whole ones."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    return hlo.cost(jax.jit(function).lower(*abstract).compile().as_text(), **options)


def kinds(cost):
    by_kind = Counter()
    for transfer in cost.transfers.values():
        by_kind[transfer.kind] += transfer.bytes
    return by_kind


@pytest.mark.parametrize("function, products", [(layers, 5), (nested, 15), (gradient, 5 + 5 + 2 * 5)])
def test_a_loop_s_products_are_counted_as_often_as_it_runs(function, products, mesh):
    # Of the checkpointed gradient XLA may drop what the second forward pass does in vain: the last layer's product.
    for cost in (on_cpu(function, X, W), on_tpu(mesh, function, X, W)):
        assert products - 1 <= cost.flops / PRODUCT <= products
        assert not cost.open_loops and not cost.uncounted


def test_what_is_computed_again_is_known_by_its_name(mesh):
    for cost in (on_cpu(gradient, X, W), on_tpu(mesh, gradient, X, W)):
        rematerialised = sum(flops for name, flops in cost.products.items() if "rematted_computation" in name)
        assert 4 <= rematerialised / PRODUCT <= 5


def test_of_two_branches_the_dearer_one_counts(mesh):
    flag = jax.ShapeDtypeStruct((), jnp.int32)
    for cost in (on_cpu(either, flag, X, W), on_tpu(mesh, either, flag, X, W)):
        assert cost.flops == 5 * PRODUCT


def test_a_loop_whose_length_is_data_is_named_and_counted_as_often_as_one_says(mesh):
    count = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = (as_data_says, count, X, W)
    for cost in (on_cpu(*shapes, open_trips=7), on_tpu(mesh, *shapes, open_trips=7)):
        assert cost.flops == 7 * PRODUCT
        assert len(cost.open_loops) == 1 and "while" in cost.open_loops[0]


def test_products_of_many_heads_count_without_the_padding_that_tpu_writes_them_with(mesh):
    q = jax.ShapeDtypeStruct((4, 64, 8, 128), jnp.bfloat16)
    for cost in (on_cpu(heads, q, q), on_tpu(mesh, heads, q, q)):
        assert cost.flops == 2 * 4 * 8 * 64 * 64 * 128


def test_flash_attention_counts_the_tiles_that_the_causal_mask_touches_and_of_these_the_given_share(mesh):
    q = jax.ShapeDtypeStruct((16, 1024, 4, 128), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((16, 1024), jnp.int32)

    def loss(q, k, v, segments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention(q, k, v, causal=True, segments=segments).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        for x in (q, q, q, segments)))  # fmt: skip
    text = lowered.compile().as_text()
    cost = hlo.cost(text)
    pairs = 10 * 256 * 256  # of 4 x 4 parts of tiles the six above the diagonal are skipped
    assert cost.flops == (2 + 5) * 2 * 128 * pairs * 2 * 4  # forward, backward; two rows of four heads a chip
    assert not cost.uncounted
    assert hlo.cost(text, tile_shares={256: 0.5, 512: 0.1}).flops == cost.flops // 2


def test_collectives_count_what_a_device_sends_by_the_best_ring(mesh):
    x = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
    part = 4 * 512 * 512

    def traffic(function, out):
        sharded, replicated = PartitionSpec("fsdp"), PartitionSpec()
        shards = jax.shard_map(function, mesh=mesh, in_specs=sharded, out_specs=sharded if out else replicated,
                               check_vma=False)  # fmt: skip
        return kinds(on_tpu(mesh, shards, x, axes=("fsdp",)))

    def ring(x):
        return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])

    assert traffic(lambda x: jax.lax.psum(x, "fsdp"), False) == {"all-reduce": 2 * part * 7 / 8}
    assert traffic(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), False) == {"all-gather": 7 * part}
    assert traffic(ring, True) == {"collective-permute": part}


@pytest.mark.parametrize("groups, devices", [
    ("{{0,1,2,3},{4,5,6,7}}", 4), ("[2,8]<=[16]", 8), ("[4,2]<=[2,4]T(1,0)", 2), ("mesh['a'=8,'b'=2] {'a'}", 8),
    ("mesh['a'=4,'b'=2,'c'=2] {'a','c'}", 8), ("mesh['a'=16] {'a':(2)4}", 4),
    ("mesh['a'=1,'b'=2,'c'=8], device_ids=([8,2]T(1,0)) {'b'}", 2),
])  # fmt: skip
def test_groups_are_read_in_every_form_that_xla_writes_them_in(groups, devices):
    text = f"""HloModule sums

ENTRY %main (x: f32[64]) -> f32[64] {{
  %x = f32[64]{{0}} parameter(0)
  ROOT %sum = f32[64]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    (transfer,) = hlo.cost(text).transfers.values()
    assert transfer.bytes == 2 * 256 * (devices - 1) // devices


def test_a_scan_over_cut_weights_gathers_each_layer_once(mesh):
    """Whichever of the ways XLA takes: gathers, gathers fused with products, or a ring of permutes."""
    stack = jax.ShapeDtypeStruct((16, 1024, 1024), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    stack_sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))),
              jax.ShapeDtypeStruct(stack.shape, stack.dtype, sharding=stack_sharding))  # fmt: skip
    lowered = jax.jit(layers).lower(*shapes)
    for options in ({}, {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}):
        cost = hlo.cost(lowered.compile(compiler_options=options).as_text())
        assert cost.flops == 16 * 2 * 512 * 1024 * 1024
        expected_bytes = 16 * 2 * 1024 * 1024 * 7 / 8
        assert expected_bytes <= kinds(cost).total() <= 1.05 * expected_bytes * 8 / 7, kinds(cost)


def test_sums_between_slices_go_over_the_network():
    pytest.importorskip("libtpu")
    mesh = find_target(configs.Mesh(slices=2), "v5e:2x2").mesh
    x, w = jax.ShapeDtypeStruct((64, 512), jnp.float32), jax.ShapeDtypeStruct((512, 512), jnp.float32)
    shardings = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ("fsdp",))]
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s, sharding in zip((x, w), shardings)]
    slope = jax.jit(jax.grad(lambda w, x: jnp.square(x @ w).sum()), out_shardings=shardings[1])
    cost = hlo.cost(slope.lower(shapes[1], shapes[0]).compile().as_text(), slices=2)
    crossing = [transfer for transfer in cost.transfers.values() if transfer.between_slices]
    assert [(transfer.kind, transfer.bytes) for transfer in crossing] == [("all-reduce", 2 * 4 * 512 * 512 / 4 / 2)]


EIGHT = """
import json, sys, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from llava_jax.plan import hlo
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
def body(total, x):
    return total + jax.lax.psum(x @ x, "x"), None
def run(x):
    return jax.lax.scan(body, jnp.zeros((64, 64)), x)[0]
shards = jax.shard_map(run, mesh=mesh, in_specs=P(None, "x"), out_specs=P(), check_vma=False)
cost = hlo.cost(jax.jit(shards).lower(jax.ShapeDtypeStruct((6, 512, 64), jnp.float32)).compile().as_text())
json.dump([cost.flops, [(one.kind, one.bytes) for one in cost.transfers.values()]], sys.stdout)
"""


def test_a_sum_in_a_loop_on_eight_cpu_devices():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    completed = subprocess.run([sys.executable, "-c", EIGHT], cwd=ROOT, env=os.environ | flags, text=True,
                               capture_output=True, timeout=120)  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    flops, transfers = json.loads(completed.stdout)
    assert flops == 6 * 2 * 64**3
    assert transfers == [["all-reduce", 6 * 2 * 4 * 64 * 64 * 7 / 8]]


def test_the_gradient_of_a_cut_matrix_is_scattered_while_it_is_reduced():
    """On a square slice, where libtpu makes an all-reduce of a reduce-scatter over all chips."""
    pytest.importorskip("libtpu")
    mesh = find_target(configs.Mesh(), "v5e:4x4").mesh
    rows, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ("fsdp",)))
    x = jax.ShapeDtypeStruct((32, 128, 512), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=cut)
    dense = Dense(1024, dtype=jnp.bfloat16, rows=("batch", "tokens"), name="gate")

    def loss(kernel, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.square(dense.apply({"params": {"kernel": kernel}}, x).astype(jnp.float32)).sum()

    sent = kinds(hlo.cost(jax.jit(jax.grad(loss), out_shardings=cut).lower(kernel, x).compile().as_text()))
    assert sent["reduce-scatter"] == 2 * 512 * 1024 * 15 / 16 and not sent["all-reduce"], sent
