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


def test_pictures_are_spread_over_all_axes_as_far_as_they_divide():
    mesh = AbstractMesh((1, 4, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    assert sharding.of_array(mesh, (32, 3), "images").spec[0] == sharding.AXES
    assert sharding.of_array(mesh, (8, 3), "images").spec[0] == ("data", "fsdp", "tensor")
    assert sharding.of_array(mesh, (6, 3), "images").spec[0] == "data"


def test_attention_cuts_heads_where_everything_else_cuts_tokens():
    mesh = AbstractMesh((1, 2, 2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    assert sharding.of_array(mesh, (4, 64, 8), "batch", None, "heads").spec[2] == ("tensor", "context")
    assert sharding.of_array(mesh, (4, 64, 8), "batch", "tokens").spec[1] == "context"
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.cuts("heads", 8) == ("tensor", "context") and sharding.cuts("heads", 2) == ("tensor",)
        assert sharding.cuts("copies", 8) == ()  # an axis of one part cuts nothing
    assert sharding.cuts("heads", 8) == ()


def test_a_model_that_answers_cuts_no_rows_where_its_weights_are_cut():
    with sharding.answering(MESH):
        assert sharding.cuts("batch", 8) == ("data",)
    with jax.sharding.use_abstract_mesh(MESH):
        assert sharding.cuts("batch", 8) == ("data", "fsdp")
    with sharding.answering(None):
        assert jax.sharding.get_abstract_mesh().empty


def test_slices_multiply_the_copies_of_the_model():
    sizes = {"data": 1, "fsdp": -1, "tensor": 2, "context": 1, "slices": 2}
    assert sharding.fill(sizes, 16) == (2, 4, 2, 1)
    with pytest.raises(ValueError, match="does not fit 6 devices"):
        sharding.fill(sizes, 6)
    with pytest.raises(ValueError, match=r"mesh.slices=2: these 2 devices are of 1 slice"):
        sharding.make_mesh(sizes | {"tensor": 1}, [jax.devices()[0]] * 2)


def test_a_function_per_shard_is_itself_without_a_mesh():
    assert sharding.per_shard(abs, [("batch",)], 0) is abs
