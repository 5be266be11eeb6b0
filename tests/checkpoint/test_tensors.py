"""One parameter at a time in Orbax's layout: an ordinary Orbax restore reads it, and damage is noticed."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from llava_jax import params
from llava_jax.checkpoint import reader, tensors, writer
from llava_jax.errors import UnusableCheckpoint

LEAVES = {
    "llm/blocks/q/kernel": np.arange(24, dtype=np.float32).reshape(4, 2, 3).astype(ml_dtypes.bfloat16),
    "llm/norm/scale": np.zeros(5, np.float16),
    "vision/cls": np.array([1.5, np.nan, -np.inf, 1e-40], np.float32),
    "step": np.array(7, np.int32),
}


def write(folder, named=LEAVES):
    with reader.TensorWriter(folder) as open_writer:
        for name, leaf in named.items():
            open_writer.write(name, leaf)
    return folder


def same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


@pytest.mark.parametrize("chunk_bytes, uncut_bytes", [(6, 2**20), (12, 0), (6, 0), (2**20, 2**20)])
def test_every_leaf_comes_back_bit_for_bit_whatever_the_chunks(tmp_path, monkeypatch, chunk_bytes, uncut_bytes):
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(writer, "UNCUT_BYTES", uncut_bytes)
    opened = tensors.open_tensors(epath.Path(write(tmp_path / "params")))
    assert set(opened.names) == set(LEAVES)
    for name, leaf in LEAVES.items():
        assert same(opened.read(name), leaf)
        spec = opened.spec(name)
        assert (spec.shape, spec.dtype) == (leaf.shape, leaf.dtype)


def test_a_leaf_that_is_no_contiguous_array_is_written_as_it_looks(tmp_path):
    leaf = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    assert same(tensors.open_tensors(epath.Path(write(tmp_path / "params", {"x": leaf}))).read("x"), leaf)


def test_orbax_restores_the_tree_with_its_own_handlers(tmp_path):
    write(tmp_path / "run" / "3" / "params")
    tree = ocp.StandardCheckpointer().restore(tmp_path / "run" / "3" / "params")
    assert all(same(np.asarray(leaf), LEAVES[name]) for name, leaf in params.flatten(tree).items())
    manager = ocp.CheckpointManager(tmp_path / "run", item_names=("params",))
    assert manager.latest_step() == 3
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wish = params.unflatten({n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for n, x in LEAVES.items()})
    restored = manager.restore(3, args=ocp.args.Composite(params=ocp.args.StandardRestore(wish))).params
    found = params.flatten(restored)
    assert set(found) == set(LEAVES) and all(isinstance(leaf, jax.Array) for leaf in found.values())
    assert all(same(np.asarray(leaf), LEAVES[name]) for name, leaf in found.items())


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
def test_what_orbax_saved_is_read_in_all_its_array_layouts(tmp_path, ocdbt, zarr3):
    tree = params.unflatten({name: jax.numpy.asarray(leaf) for name, leaf in LEAVES.items()})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "5" / "params", args=ocp.args.PyTreeSave(tree))
    assert reader.steps(tmp_path) == [5]
    for name, leaf in LEAVES.items():
        assert same(reader.read_tensor(tmp_path, 5, name), leaf)
    assert reader.own_tensors(tmp_path).checksums == {}


def test_a_flipped_bit_a_lost_chunk_and_a_cut_file_are_all_noticed(tmp_path):
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((4, 64, 8)).astype(np.float32)
    for damage in ("flip", "lose", "cut"):
        folder = write(tmp_path / damage / "params", {"a/kernel": leaf})
        file = next(path for path in (folder / "a.kernel").iterdir() if path.name != ".zarray")
        content = bytearray(file.read_bytes())
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        if damage == "lose":
            file.unlink()
        else:
            file.write_bytes(content if damage == "flip" else content[:-3])
        with pytest.raises(UnusableCheckpoint, match="a/kernel is damaged"):
            tensors.open_tensors(epath.Path(folder)).read("a/kernel")


def test_nothing_half_written_is_taken_for_a_checkpoint(tmp_path):
    killed = reader.TensorWriter(tmp_path / "0" / "params")
    killed.write("a", np.ones(3, np.float32))
    assert reader.latest_step(tmp_path) is None  # killed here
    write(tmp_path / "0" / "params", {"b": np.ones(2, np.float32)})  # the next run starts over
    assert reader.own_tensors(tmp_path).names == ("b",)
    with pytest.raises(RuntimeError), reader.TensorWriter(tmp_path / "1" / "params") as cut_off:
        cut_off.write("a", np.ones(3, np.float32))
        raise RuntimeError
    assert not list((tmp_path / "1").iterdir())


def test_writing_refuses_what_it_cannot_give_back(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        reader.TensorWriter(tmp_path)
    with pytest.raises(ValueError, match="no parameter was written"):
        write(tmp_path / "none", {})
    for name, leaf, message in [("x", np.zeros((2, 0)), "empty"), ("x", np.array(["a"]), "dtype")]:
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "params", {name: leaf})
    twice = reader.TensorWriter(tmp_path / "twice")
    twice.write("x", np.ones(1))
    with pytest.raises(ValueError, match="x is written twice"):
        twice.write("x", np.ones(1))


def test_writing_takes_no_second_leaf_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 2**18)
    leaf = np.ones((32, 2**18), np.float32)  # 32 MB
    with reader.TensorWriter(tmp_path / "params") as open_writer:
        tracemalloc.start()
        open_writer.write("x", leaf)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * 2**20, f"{peak} bytes beside the leaf"


def test_broken_metadata_is_one_clear_error(tmp_path):
    folder = write(tmp_path / "0" / "params")
    for content in ("{", "[]", "[" * 100_000, json.dumps({"tree_metadata": 3})):
        (folder / "_METADATA").write_text(content)
        with pytest.raises(UnusableCheckpoint, match="_METADATA"):
            tensors.open_tensors(epath.Path(folder))
        assert reader.steps(tmp_path) == []
