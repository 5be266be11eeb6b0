"""Their files: what is read lazily, what is written as a stream, and what is refused."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from llava_jax.convert import files, torch_zip
from llava_jax.errors import UnusableCheckpoint
from tests.convert.tiny import DTYPES, as_dtype

TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32), "c": np.float32(3)}


def typed(dtype):
    return as_dtype({name: np.asarray(tensor) for name, tensor in TENSORS.items()}, dtype)


def same(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1, 30, 10**9])
def test_shards_written_as_a_stream_are_read_by_the_library_and_by_us(tmp_path, dtype, shard_bytes):
    tensors = typed(dtype)
    specs = {name: files.Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    files.write_shards(tmp_path, specs, iter(tensors.items()), shard_bytes)
    read = files.open_tensors(tmp_path)
    assert read.specs == specs
    assert all(same(read.read(name), tensor) for name, tensor in tensors.items())
    theirs = {}
    for path in tmp_path.glob("*.safetensors"):
        theirs |= load_file(path)
    assert all(same(theirs[name], tensor) for name, tensor in tensors.items())
    index = tmp_path / files.INDEX
    assert index.exists() == (shard_bytes < 10**9)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert set(content["weight_map"]) == set(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_torch_file_written_here_is_read_here(tmp_path, dtype):
    tensors = typed(dtype)
    torch_zip.write_torch(tmp_path / "mm_projector.bin", tensors)
    read = files.open_tensors(tmp_path / "mm_projector.bin")
    assert set(read.specs) == set(tensors)
    assert all(same(read.read(name), tensor) for name, tensor in tensors.items())


def test_torch_reads_what_is_written_here_and_the_other_way_round(tmp_path):
    torch = pytest.importorskip("torch")
    for dtype in DTYPES:
        torch_zip.write_torch(tmp_path / "ours.bin", typed(dtype))
        read = torch.load(tmp_path / "ours.bin", weights_only=True)
        assert {str(tensor.dtype) for tensor in read.values()} == {f"torch.{dtype}"}
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(read[name].float().numpy(), tensor)
    whole = torch.arange(24.0).reshape(4, 6)
    kinds = {"view": whole[1:3, ::2], "turned": whole.T, "tied": whole, "scalar": torch.tensor(2, dtype=torch.int64)}
    kinds |= {"half": whole.half(), "bf16": whole.bfloat16(), "parameter": torch.nn.Parameter(whole)}
    module = torch.nn.Linear(2, 3)
    for name, state in (("dict", kinds), ("module", module.state_dict())):
        torch.save(state, tmp_path / name)
        read = files.open_tensors(tmp_path / name)
        for key, tensor in state.items():
            np.testing.assert_array_equal(
                read.read(key).astype(np.float64), tensor.detach().double().numpy(), err_msg=key
            )


class Evil:
    """What a pickle can do: call anything with anything."""

    def __init__(self, function, arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_pickle(path, content, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("archive/data.pkl", content)
    return path


def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path):
    import os

    target = tmp_path / "pwned"
    calls = [(os.system, (f"touch {target}",)), (eval, (f"open({str(target)!r}, 'w')",)), (getattr, (1, "x"))]
    for call in calls:
        for place in (Evil(*call), {"a": Evil(*call)}, {"a": [Evil(*call)]}):
            path = write_pickle(tmp_path / "evil.bin", pickle.dumps(place, protocol=2))
            with pytest.raises(UnusableCheckpoint, match=r"refused.*which could run any code"):
                files.open_tensors(path)
    assert not target.exists()


def test_odd_torch_files_are_refused_with_their_reason(tmp_path):
    path = tmp_path / "x.bin"
    plain = pickle.dumps({"a": 3}, protocol=2)
    cases = [
        (lambda: write_pickle(path, plain), "entry 'a' is a int; wanted tensors"),
        (lambda: write_pickle(path, pickle.dumps([1], protocol=2)), "holds a list"),
        (lambda: write_pickle(path, plain, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), "neither safetensors nor"),
        (lambda: path.write_bytes(b""), "neither safetensors"),
    ]
    for make, message in cases:
        make()
        with pytest.raises(UnusableCheckpoint, match=message):
            files.open_tensors(path)


def test_a_tensor_cannot_reach_outside_its_storage_nor_ask_for_more_than_it_has(tmp_path):
    torch_zip.write_torch(tmp_path / "good.bin", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    with zipfile.ZipFile(tmp_path / "good.bin") as file:
        entries = {name: file.read(name) for name in file.namelist()}
    number = b"\x8a\x08" + (3).to_bytes(8, "little")
    for wrong in (-1, 4, 2**40):
        changed = entries["good/data.pkl"].replace(number, b"\x8a\x08" + wrong.to_bytes(8, "little", signed=True))
        with zipfile.ZipFile(tmp_path / "bad.bin", "w") as file:
            for name, content in entries.items():
                file.writestr(name, changed if name.endswith(".pkl") else content)
        with pytest.raises(UnusableCheckpoint, match="reaches outside its storage"):
            files.open_tensors(tmp_path / "bad.bin")


def test_random_damage_gives_the_tensors_or_one_clear_error_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    torch_zip.write_torch(tmp_path / "x.bin", TENSORS | {"c": np.zeros(2, np.float16)})
    save_file({"a": np.arange(9.0)}, tmp_path / "y.safetensors", metadata={"format": "pt"})
    for name in ("x.bin", "y.safetensors"):
        content = (tmp_path / name).read_bytes()
        for _ in range(300):
            damaged = bytearray(content)
            for place in rng.integers(len(content), size=3):
                damaged[place] = rng.integers(256)
            (tmp_path / "damaged").write_bytes(damaged[: rng.integers(1, len(content) * 3)])
            try:
                read = files.open_tensors(tmp_path / "damaged")
                for tensor in read.specs:
                    read.read(tensor)
            except UnusableCheckpoint:
                pass


def test_an_index_must_fit_its_shards_and_stay_in_its_directory(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "s1.safetensors")
    save_file({"b": np.ones(2), "a": np.ones(2)}, tmp_path / "s2.safetensors")
    index = tmp_path / files.INDEX
    cases = [
        ({"a": "s1.safetensors", "b": "s1.safetensors"}, UnusableCheckpoint, "b is in the index but in no shard"),
        ({"a": "s1.safetensors", "b": "s2.safetensors"}, UnusableCheckpoint, "tensor a is in another file"),
        ({"a": "../s1.safetensors"}, UnusableCheckpoint, "same directory"),
        ({"a": "s3.safetensors"}, FileNotFoundError, "s3.safetensors is missing"),
        ({}, UnusableCheckpoint, "no weight_map"),
    ]
    for weight_map, kind, message in cases:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(kind, match=message):
            files.open_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights here"):
        files.open_tensors(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_is_refused_by_its_file(tmp_path, name):
    for text in ("", "{", "\0", "[" * 100_000, '{"a": ' * 50_000):
        (tmp_path / name).write_text(text)
        with pytest.raises(UnusableCheckpoint, match=name):
            files.read_json(epath.Path(tmp_path / name)) if name == "config.json" else files.open_tensors(tmp_path)
