"""The contract: the shapes and types of a batch, known without data."""

import jax
import numpy as np
import pytest

from llava_jax.batch import Batch, Field, spec


def test_a_spec_has_the_shapes_and_types_of_the_contract():
    fields = spec(rows=8, row_tokens=64, groups=4, images_per_group=3, image_size=28)
    assert fields.pixels == Field((4, 3, 28, 28, 3), np.dtype("uint8"))
    assert fields.weights == Field((8, 64), np.dtype("float32"))
    for name in ("tokens", "targets", "positions", "segments", "image_slots"):
        assert fields._asdict()[name] == Field((8, 64), np.dtype("int32")), name


def test_a_batch_is_a_tree_that_jax_maps_over():
    fields = spec(rows=2, row_tokens=4, groups=2, images_per_group=1, image_size=2)
    batch = Batch(*(np.zeros(field.shape, field.dtype) for field in fields))
    assert jax.tree.map(lambda x: x.shape, batch) == Batch(*(field.shape for field in fields))


@pytest.mark.parametrize("name", ["rows", "row_tokens", "groups", "images_per_group", "image_size"])
def test_a_size_below_one_is_refused_by_name(name):
    sizes = {"rows": 2, "row_tokens": 4, "groups": 1, "images_per_group": 1, "image_size": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"batch {name}=0: want at least 1"):
        spec(**sizes)


def test_groups_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match="rows=6 do not divide into groups=4"):
        spec(rows=6, row_tokens=4, groups=4, images_per_group=1, image_size=2)
