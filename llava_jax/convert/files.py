"""Their arrays on disk: safetensors read lazily and written as a stream, `.bin` files read without torch.

Nothing here knows a model; a name is a name. Memory is one tensor, whatever the size of a file.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from llava_jax import files, streams
from llava_jax.checkpoint.model_json import download
from llava_jax.convert import torch_zip
from llava_jax.errors import MissingWeights, UnusableCheckpoint

INDEX = "model.safetensors.index.json"
# In the order in which transformers prefers them.
_ENTRIES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
DTYPES = {code: np.dtype(kind) for code, kind in _DTYPES.items()} | {
    "BOOL": np.dtype("?"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MOST_HEADER_BYTES = 10**8  # the library refuses longer ones
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """Shape and dtype of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles:
    """All tensors of a directory (or of one file) by name; a tensor is read when it is asked for.

    Attributes:
      path: where they lie, for messages.
      specs: {name: Spec}, known without reading a tensor.
    """

    def __init__(self, path: epath.PathLike, readers: Mapping[epath.Path, "_Reader"]):
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._reader: dict[str, _Reader] = {}
        for file, reader in readers.items():
            for name, spec in reader.specs.items():
                if name in self.specs:
                    raise UnusableCheckpoint(f"{file}: tensor {name} is in another file too; delete one of the two")
                self.specs[name], self._reader[name] = spec, reader

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype. Raises UnusableCheckpoint when the file is damaged."""
        return self._reader[name].read(name)


class _Reader:
    """One file: `specs` and `read`."""

    specs: dict[str, Spec]

    def read(self, name: str) -> np.ndarray:
        raise NotImplementedError


class _SafeTensors(_Reader):
    """The library checks the header (lengths, gaps, overlaps); the bytes are read with plain reads, since the pages of
    a mapped file count as memory in use where memory is limited."""

    def __init__(self, path: epath.Path):
        self._path = path
        try:
            size, header = _read_header(path)
        except safetensors.SafetensorError as error:
            raise UnusableCheckpoint(f"{path}: no whole safetensors file ({error}); download it again") from None
        header.pop("__metadata__", None)
        self.specs = {name: Spec(tuple(x["shape"]), self._dtype(name, x["dtype"])) for name, x in header.items()}
        self._begin = {name: 8 + size + x["data_offsets"][0] for name, x in header.items()}

    def _dtype(self, name: str, code: str) -> np.dtype:
        if code not in DTYPES:
            raise UnusableCheckpoint(f"{self._path}: tensor {name} has dtype {code}; wanted one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        shape, dtype = self.specs[name]
        if not files.is_bucket(self._path):
            return np.fromfile(self._path, dtype, math.prod(shape), offset=self._begin[name]).reshape(shape)
        size = math.prod(shape) * dtype.itemsize
        return np.frombuffer(files.read_range(self._path, self._begin[name], size), dtype).reshape(shape)


def _read_header(path: epath.Path) -> tuple[int, dict[str, Any]]:
    """(bytes of the header, its content), which the library has checked.

    The library opens a file on a disk. For one in a bucket that is a file with the same header and a hole for the rest.

    Raises:
      SafetensorError: the header is damaged, or does not fit the file.
    """
    with streams.open_read(path) as file, tempfile.NamedTemporaryFile() as stand_in:
        end = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        size = int.from_bytes(start, "little")
        header = file.read(min(size, _MOST_HEADER_BYTES))
        if files.is_bucket(path):
            stand_in.write(start + header)
            stand_in.truncate(end)
        with safetensors.safe_open(stand_in.name if files.is_bucket(path) else str(path), framework="numpy"):
            return size, json.loads(header)


class _Torch(_Reader):
    def __init__(self, path: epath.Path):
        self._file = torch_zip.TorchZip(path)
        self.specs = {name: Spec(t.shape, t.dtype) for name, t in self._file.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._file.read(name)


def open_tensors(path: epath.PathLike) -> TensorFiles:
    """The tensors of a Hugging Face directory, sharded or not, or of one `.safetensors` or torch file.

    Raises:
      FileNotFoundError: no weights there, or a shard is missing.
      UnusableCheckpoint: a file is damaged, unsafe or of an unknown kind, or an index does not fit its shards.
    """
    path = epath.Path(path)
    if files.is_file(path):
        return TensorFiles(path, {path: _open(path)})
    entry = next((path / name for name in _ENTRIES if files.is_file(path / name)), None)
    if entry is None:
        raise MissingWeights(f"{path}: no weights here; wanted one of {', '.join(_ENTRIES)} in a directory")
    if entry.suffix != ".json":
        return TensorFiles(path, {entry: _open(entry)})
    listed = _read_index(entry)
    tensors = TensorFiles(path, {file: _open(file) for file in sorted({path / shard for shard in listed.values()})})
    missing = [name for name in listed if name not in tensors.specs]
    if missing:
        raise UnusableCheckpoint(
            f"{entry}: {missing[0]} is in the index but in no shard ({len(missing)} such); download it again"
        )
    return tensors


def open_files(directory: epath.Path, members: Sequence[epath.Path]) -> TensorFiles:
    """The tensors of some files of a directory as one. Raises UnusableCheckpoint as `open_tensors`."""
    return TensorFiles(directory, {file: _open(file) for file in members})


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or UnusableCheckpoint where the file holds something else."""
    try:
        content = json.loads(files.read(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MissingWeights(f"{path} is missing; want a copy of the whole directory{download(path.parent)}") from None
    except (ValueError, RecursionError) as error:
        raise UnusableCheckpoint(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UnusableCheckpoint(f"{path}: holds a {type(content).__name__}, wanted an object")
    return content


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes JSON as Hugging Face does: indented by two, with a line end."""
    files.write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_shards(
    directory: epath.PathLike, specs: Mapping[str, Spec], tensors: Iterator[tuple[str, np.ndarray]],
    shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Writes `model*.safetensors` and its index as the tensors come; memory is one tensor.

    Args:
      specs: every tensor that will come, in the order in which it will come.
      shard_bytes: a new file begins where this would be passed.
    """
    directory = epath.Path(directory)
    shards = _group(specs, shard_bytes)
    total = sum(_nbytes(spec) for spec in specs.values())
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, content)
    for file, shard in zip(names, shards):
        write_safetensors(directory / file, {name: specs[name] for name in shard}, tensors)
    assert next(tensors, None) is None, "more tensors than specs"


def write_safetensors(
    path: epath.PathLike, specs: Mapping[str, Spec], tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Writes one file, taking as many tensors as `specs` has, which come in its order.

    The library wants a file's tensors all at once; the format is a length, a JSON header and bytes.
    Source: https://huggingface.co/docs/safetensors (format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers before 4.50 refuses files without it
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + _nbytes(spec)
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write() -> None:
        with epath.Path(path).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for wanted, spec in specs.items():
                name, array = next(tensors)
                assert (name, array.shape, array.dtype) == (wanted, *spec), (name, array.shape, array.dtype, wanted)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                del array  # it may be a view that keeps the whole parameter while the next one is read

    files.retried(write, path, secs=0.0)  # once: the tensors come once; what a bucket raises becomes a line


def _group(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _nbytes(spec) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(spec)
    return shards


def _nbytes(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _open(path: epath.Path) -> _Reader:
    if not files.is_file(path):
        raise MissingWeights(f"{path} is missing; download the directory again, whole")
    start = files.read_range(path, 0, 9)
    # A safetensors file begins with the header's length and its brace, a torch file with a zip's signature.
    if start[8:9] == b"{":
        return _SafeTensors(path)
    return _Torch(path)


def _read_index(path: epath.Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UnusableCheckpoint(f"{path}: no weight_map in it; download it again")
    for name, shard in listed.items():
        if not isinstance(shard, str) or "/" in shard:
            raise UnusableCheckpoint(f"{path}: {name} points to {shard!r}; wanted a file in the same directory")
    return listed
