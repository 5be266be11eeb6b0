"""The mesh and the tables that cut parameters and activations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llava_jax import params, sharding
from llava_jax.models import presets
from llava_jax.models.llava import abstract_params

SIZES = {"data": 1, "fsdp": -1, "tensor": 2, "context": 1}
MESH = AbstractMesh((2, 4, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def specs(preset):
    found = sharding.of_parameters(abstract_params(presets.get(preset)), MESH)
    return {name: leaf.spec for name, leaf in params.flatten(found).items()}


def test_minus_one_takes_the_devices_that_are_left():
    assert sharding.fill(SIZES, 8) == (1, 4, 2, 1)
    assert sharding.fill(SIZES, 2) == (1, 1, 2, 1)
    assert sharding.fill(SIZES | {"fsdp": 3}, 6) == (1, 3, 2, 1)


@pytest.mark.parametrize("sizes, devices", [(SIZES, 3), (SIZES | {"fsdp": 2}, 8), ({"data": 1}, 1)])
def test_sizes_that_do_not_fit_are_refused_with_the_product_wanted(sizes, devices):
    with pytest.raises(ValueError, match=r"mesh=.*(must be|want exactly)"):
        sharding.fill(sizes, devices)


def test_matrices_are_cut_by_their_trailing_dimensions_and_norms_are_whole():
    found = specs("llava15_7b")
    assert found["llm/blocks/q/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["llm/blocks/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["vision/blocks/fc1/bias"] == PartitionSpec(None, "tensor")
    assert found["vision/patch/kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert found["llm/embed/table"] == PartitionSpec("tensor", "fsdp")
    assert not any(found["llm/norm/scale"])


def test_hardly_anything_of_a_7b_model_is_whole_on_every_device():
    shapes, found = params.flatten(abstract_params(presets.get("llava15_7b"))), specs("llava15_7b")
    whole = sum(shapes[name].size for name, spec in found.items() if not any(spec))
    assert whole < 0.001 * sum(leaf.size for leaf in shapes.values())


def test_an_axis_that_does_not_divide_its_dimension_is_left_out():
    tree = {"llm": {"head": {"kernel": jax.ShapeDtypeStruct((64, 32003), jnp.float32)}}}
    assert sharding.of_parameters(tree, MESH)["llm"]["head"]["kernel"].spec == PartitionSpec("fsdp", None)


def test_without_a_mesh_constrain_returns_its_argument():
    x = jnp.ones((4, 8))
    assert sharding.constrain(x, "batch", "tokens") is x


def test_with_a_mesh_constrain_cuts_by_logical_names():
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])

    def cut(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sharding.constrain(x, "batch", "tokens")

    jaxpr = str(jax.make_jaxpr(cut)(jnp.ones((4, 8))))
    assert "sharding_constraint" in jaxpr and "('data', 'fsdp'), 'context'" in jaxpr
