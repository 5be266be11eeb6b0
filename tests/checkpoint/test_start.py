"""Bytes and memory at a start: each process reads the parts of the model that its devices hold, and little else."""

import tracemalloc

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import AbstractMesh, AxisType

from llava_jax import params, sharding
from llava_jax.checkpoint import reader, sharded, tensors
from llava_jax.checkpoint.tensors import Request
from llava_jax.errors import UnusableCheckpoint

MODEL = {
    "llm/embed/table": (4096, 256), "llm/blocks/q/kernel": (6, 256, 512), "llm/blocks/down/kernel": (6, 512, 256),
    "llm/blocks/input_norm/scale": (6, 256), "llm/head/kernel": (256, 4096), "vision/blocks/fc1/kernel": (3, 256, 1024),
    "vision/blocks/fc1/bias": (3, 1024), "projector/0/kernel": (256, 256),
}  # fmt: skip


def _arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in MODEL.items()}


def _write(folder, arrays):
    with reader.TensorWriter(folder / "0" / "params") as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def _boxes(number, of):
    """{name: what process `number` of `of`, with one device each and fsdp across them, holds of it}."""
    mesh = AbstractMesh((1, of, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    shapes = params.unflatten({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in MODEL.items()})
    boxes = {}
    for name, cut in params.flatten(sharding.of_parameters(shapes, mesh)).items():
        axes = [*cut.spec, *[None] * len(MODEL[name])]
        parts = [of if "fsdp" in (axis if isinstance(axis, tuple) else (axis,)) else 1 for axis in axes]
        boxes[name] = tuple(
            (size // n * (number % n), size // n * (number % n + 1)) for size, n in zip(MODEL[name], parts)
        )
    return boxes


@pytest.mark.parametrize("of", [2, 4])
def test_processes_together_read_hardly_more_than_the_model_from_a_bucket(bucket, bucket_proxy, of):
    run, arrays = epath.Path(bucket) / "base", _arrays()
    _write(run, arrays)
    opened = reader.own_tensors(run)
    bucket_proxy.requests.clear()
    everywhere = []
    for number in range(of):
        boxes = _boxes(number, of)
        parts = {}
        for read in tensors.read([Request(opened, name, [box]) for name, box in boxes.items()], lambda read: read):
            index = tuple(slice(*bounds) for bounds in boxes[read.name])
            np.testing.assert_array_equal(read.take(index), arrays[read.name][index])
            parts[read.name] = [[box, found] for box, found in read.sums.items()]
        everywhere.append(parts)
    assert sharded.difference(dict.fromkeys(MODEL, opened), everywhere) == ""
    sent = sum(request.sent_bytes for request in bucket_proxy.requests)
    size = sum(array.nbytes for array in arrays.values())
    print(f"{of} processes read {sent / size:.3f} times the model")
    assert sent <= 1.15 * size, f"{sent / size:.2f} times the model"
    everywhere[-1]["llm/blocks/q/kernel"][0][1] = (0, 0)
    fault = sharded.difference(dict.fromkeys(MODEL, opened), everywhere)
    assert fault == "llm/blocks/q/kernel differs from its checksum"


def test_boxes_in_one_chunk_are_read_together_and_each_chunk_once(bucket, bucket_proxy):
    """A host of four chips holds four neighbouring parts, and those of some orders of devices lie apart."""
    array = np.arange(64 * 2048, dtype=np.float32).reshape(1, 64, 2048).repeat(4, 0)  # 2 MiB, in 4 x 4 chunks
    run = epath.Path(bucket) / "base"
    _write(run, {"x": array})
    opened = reader.own_tensors(run)
    size = array.nbytes
    for rows, fraction in (((0, 4, 8, 12), 0.25), ((0, 4, 48, 60), 0.5)):
        boxes = [((0, 4), (row, row + 4), (0, 2048)) for row in rows]
        bucket_proxy.requests.clear()
        (read,) = tensors.read([Request(opened, "x", boxes)], lambda read: read)
        sent = sum(request.sent_bytes for request in bucket_proxy.requests)
        assert sent <= 1.02 * fraction * size, f"{sent / size:.2f}"
        assert set(read.sums) == set(boxes)
        for row in rows:
            index = (slice(None), slice(row, row + 4), slice(None))
            np.testing.assert_array_equal(read.take(index), array[index])


def test_reading_large_arrays_takes_the_memory_of_one_and_a_few_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "AHEAD_BYTES", 2**20)
    array = np.ones((64, 2**18), np.float32)  # 64 MiB
    _write(tmp_path, {"x": array, "y": array})
    opened = reader.own_tensors(tmp_path)
    opened.spec("x")
    tracemalloc.start()
    assert tensors.read([Request(opened, name) for name in "xy"], lambda read: read.whole().nbytes) == [2**26, 2**26]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * array.nbytes, f"{peak / array.nbytes:.2f} arrays"


def test_only_as_many_arrays_are_held_as_the_bound_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "AHEAD_BYTES", 3 * 2**20)
    arrays = {f"x{i}": np.full((4, 2**16), i, np.float32) for i in range(12)}  # 1 MiB each
    _write(tmp_path, arrays)
    opened = reader.own_tensors(tmp_path)
    opened.spec("x0")
    tracemalloc.start()
    tensors.read(
        [Request(opened, name) for name in arrays],
        lambda read: np.testing.assert_array_equal(read.whole(), arrays[read.name]),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_a_damaged_part_is_found_by_the_sums_of_all_parts(tmp_path):
    array = np.random.default_rng(0).standard_normal((4, 64, 2048)).astype(np.float32)
    _write(tmp_path, {"x": array})
    file = tmp_path / "0" / "params" / "x" / "0.3.3"
    data = bytearray(file.read_bytes())
    data[1000] ^= 8
    file.write_bytes(data)
    opened = reader.own_tensors(tmp_path)
    everywhere = []
    for number in range(4):
        box = ((0, 4), (16 * number, 16 * number + 16), (0, 2048))
        (read,) = tensors.read([Request(opened, "x", [box])], lambda read: read)
        everywhere.append({"x": [[list(map(list, box)), list(read.sums[box])]]})
    assert sharded.difference({"x": opened}, everywhere) == "x differs from its checksum"
    with pytest.raises(UnusableCheckpoint, match="x is damaged"):
        opened.read("x")
