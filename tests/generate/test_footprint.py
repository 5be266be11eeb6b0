"""Answering compiles for slices of TPUs, on one's own mesh as on that of training, and leaves room on the chips.

`pytest -s -m slow tests/generate/test_footprint.py` prints what launch/README says of memory.
"""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llava_jax import chips, sharding
from llava_jax import config as configs
from llava_jax.generate import placement
from llava_jax.generate.engine import Engine, Shape
from llava_jax.generate.footprint import footprint, weights
from llava_jax.models import presets
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.plan.compile import find_target
from tests.generate import tiny

SLOTS = 4
# Head widths of the real models, as splash attention wants them.
SMALL = replace(tiny.CONFIG, llm=replace(tiny.CONFIG.llm, layers=2, width=256, kv_heads=4, head_width=128))


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu")


def devices(topology):
    return list(find_target(configs.Mesh(), topology).mesh.devices.flat)


def test_samples_of_training_compile_on_four_chips():
    """The prompt's bucket takes the kernel, which XLA cannot partition by itself; weights stay where they are."""
    mesh = find_target(configs.Mesh(), "v5e:2x2").mesh
    assert mesh.shape["fsdp"] == 4
    tree = abstract_params(SMALL)
    tree = jax.tree.map(lambda x, cut: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=cut), tree,
                        sharding.of_parameters(tree, mesh))  # fmt: skip
    runner = Engine(Llava(SMALL, jnp.bfloat16, "full"), SLOTS, SMALL.llm.vocab, (2,), mesh)
    start, advance = (program.as_text() for program in runner.compiled(tree, Shape(768, 768, 1)))
    assert start.count("tpu_custom_call") >= SMALL.llm.layers
    gathered = [math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]\S* all-gather", advance)]
    assert max(gathered, default=0) <= SLOTS * SMALL.llm.vocab


def test_a_model_in_parts_takes_less_of_a_chip_than_its_copies():
    parts, copies = (
        footprint(Llava(SMALL, jnp.bfloat16), sharding.mesh_of_copies(n, devices("v5e:2x2")), SLOTS, Shape(768, 768, 1))
        for n in (1, 4)
    )
    assert 0 < parts.decode < copies.decode


def test_the_devices_of_one_host_of_a_slice_make_a_mesh():
    hosts = {device.process_index for device in devices("v5e:4x4")}
    local = [device for device in devices("v5e:4x4") if device.process_index == max(hosts)]
    assert len(local) == 4 and sharding.mesh_of_copies(2, local).size == 4


@pytest.mark.slow
@pytest.mark.parametrize("preset, topology", [("llava15_7b", "v5e:2x2"), ("llava15_13b", "v5e:2x4")])
def test_sixteen_requests_to_the_real_models_fit(preset, topology):
    """Prompts of 1,024 tokens with a picture, and up to 512 new ones."""
    config, chip = presets.get(preset), chips.of_topology(topology)
    model = Llava(config, jnp.bfloat16)
    row = placement.row_bytes(config.llm, model.dtype, config.llm.usable_positions)
    here = devices(topology)
    held = weights(model, sharding.mesh_of_copies(len(here), here))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    mesh = placement.choose_mesh(size, row, 16, here, float(chip.hbm_bytes))
    found = footprint(model, mesh, 16, Shape(1024, 1536, 1))
    peaks = ", ".join(f"{name} {value / chips.GIB:.2f} GiB" for name, value in found._asdict().items())
    print(f"\n{preset}, 16 requests on {topology}, {dict(mesh.shape)}: {peaks} a chip")
    assert max(found) <= 0.75 * chip.hbm_bytes
