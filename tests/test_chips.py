"""The table of chips: names and topologies, and that the compilers agree with every line of it."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from llava_jax import chips, sharding
from llava_jax import config as configs

TPUS = [chip for chip in chips.CHIPS if not chip.cuda]


def place(topology):
    if not chips.of_topology(topology).cuda:
        pytest.importorskip("libtpu")
    elif not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        pytest.skip("jax's plugin for CUDA is not installed")
    from llava_jax.plan.compile import find_target

    return find_target(configs.Mesh(), topology)


def test_a_device_finds_its_chip_by_what_it_calls_itself():
    assert chips.of_kind("TPU v5 lite").name == "v5e"
    assert chips.of_kind("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert chips.of_kind("cpu") is None


def test_a_topology_says_its_chip_its_shape_and_its_hosts():
    assert chips.of_topology("v5p:2x2x4").kind == "TPU v5"
    assert chips.dimensions("v5p:2x2x4") == (2, 2, 4)
    assert [chips.hosts(name) for name in ("v5e:1x1", "v5e:2x2", "v5e:4x4", "v5p:8x8x8")] == [1, 1, 4, 128]
    assert chips.dimensions("H100:8") == (8,) and chips.hosts("H100:8") == 1


@pytest.mark.parametrize("topology, wanted", [
    ("v5e:3x3", "2x2, 2x4, 4x4"), ("v5e", "2x2, 2x4, 4x4"), ("v5e:4x8x1", "did you mean v5e:4x8?"),
    ("v9:2x2", "v4, v5e, v5p, v6e, tpu7x, A100-40, A100, H100, H200"), ("H100:3", "H100 comes as 1, 2, 4, 8"),
    ("", "want CHIP:SHAPE"),
])  # fmt: skip
def test_a_topology_that_nobody_leases_is_refused_with_those_that_are(topology, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        chips.of_topology(topology)


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_the_compiler_knows_every_shape_with_as_many_devices_of_that_kind(chip):
    for shape in (shape for shape in chip.shapes if math.prod(chips.dimensions(f"{chip.name}:{shape}")) <= 512):
        found = place(f"{chip.name}:{shape}")
        assert found.devices == found.chips * chip.devices_per_chip
        device = found.mesh.devices.flat[0]
        assert device.device_kind == chip.kind
        hosts = {one.process_index for one in found.mesh.devices.flat}
        assert len(hosts) == found.hosts, shape


def compiled(found, options):
    """A product of cut matrices, so that there is a gather to schedule."""
    own = sharding.of_array(found.mesh, (256, 256), "batch")
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=own)
    return jax.jit(lambda x: x @ x.T, out_shardings=own).lower(x).compile(compiler_options=options)


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_the_compiler_takes_every_option_of_a_chip_and_refuses_one_that_is_none_of_its_own(chip):
    found = place(f"{chip.name}:{chip.shapes[1]}")
    assert compiled(found, dict(chip.compiler_options)).memory_analysis().argument_size_in_bytes > 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_make_it_fast'"):
        compiled(found, {"xla_tpu_make_it_fast": True})


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_the_compiler_s_limit_of_memory_is_the_table_s(chip):
    found = place(f"{chip.name}:{chip.shapes[0]}")
    whole = sharding.replicated(found.mesh)
    x = jax.ShapeDtypeStruct((300 * 2**20, 512), jnp.bfloat16, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: jax.lax.optimization_barrier(x * 2).sum(), out_shardings=whole).lower(x).compile()
    limit = float(re.search(r"available HBM \(([\d.]+)G\)", str(error.value))[1])
    assert limit == pytest.approx(chip.hbm_bytes / chips.GIB, abs=0.005)
