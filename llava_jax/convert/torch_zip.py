"""`.bin` and `.pth` files of torch, read and written without torch.

Such a file is a zip of raw storages and one pickle. A pickle can run any code, so this one is read by an
unpickler that knows three calls and refuses all others. Source: torch/serialization.py, the zip format of
torch >= 1.6.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from llava_jax import files, streams
from llava_jax.errors import UnusableCheckpoint

_STORAGES = {
    "FloatStorage": np.dtype("f4"), "HalfStorage": np.dtype("f2"), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("f8"), "LongStorage": np.dtype("i8"), "IntStorage": np.dtype("i4"),
    "ShortStorage": np.dtype("i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
# What Python's unpickler raises on bytes that are no pickle, or not one of ours.
_BROKEN = (pickle.UnpicklingError, TypeError, ValueError, LookupError, AttributeError, EOFError, OverflowError,
           MemoryError)  # fmt: skip
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError, OSError,
            struct.error)  # fmt: skip
_PICKLE_BYTES = 64 * 2**20  # a state dict's pickle holds names and shapes: 100 kB for a 13B


TRAINER = "model"  # where LAVIS and MiniGPT-4 keep the weights in a checkpoint


class Storage(NamedTuple):
    """Raw bytes in the zip that tensors look at."""

    key: str
    dtype: np.dtype
    count: int


class StoredTensor(NamedTuple):
    """Part of a storage: `offset` and `strides` in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype


class TorchZip:
    """A torch file; `tensors` are known at once, their bytes are read when asked for."""

    def __init__(self, path: epath.Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(streams.open_read(path))
            entries = self._zip.infolist()
        except _BAD_ZIP:
            raise UnusableCheckpoint(
                f"{path}: neither safetensors nor a whole torch file (torch >= 1.6); download it again, or save it "
                "anew as safetensors"
            ) from None
        # torch never compresses: a compressed entry is a zip bomb or another program's file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UnusableCheckpoint(f"{path}: has compressed entries, which torch never writes; not read")
        self._sizes = {entry.filename: entry.file_size for entry in entries}
        pickles = [name for name in self._sizes if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnusableCheckpoint(f"{path}: a zip without one data.pkl; wanted weights saved by torch.save")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._sizes[pickles[0]] > _PICKLE_BYTES:
            raise UnusableCheckpoint(f"{path}: its pickle has {self._sizes[pickles[0]]} bytes; no weights need so many")
        self.tensors = self._read_pickle(self._read_entry(pickles[0]))

    def read(self, name: str) -> np.ndarray:
        """One tensor, as an array of its own."""
        tensor = self.tensors[name]
        content = self._read_entry(f"{self._root}data/{tensor.storage.key}")
        flat = np.frombuffer(content, tensor.dtype)[tensor.offset :]
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False).copy()

    def _read_entry(self, name: str) -> bytes:
        try:
            content = self._zip.read(name)
        except _BAD_ZIP as error:
            raise UnusableCheckpoint(f"{self._path}: {name} in it is damaged ({error}); download it again") from None
        if len(content) != self._sizes[name]:
            raise UnusableCheckpoint(f"{self._path}: {name} in it is cut off; download it again")
        return content

    def _read_pickle(self, content: bytes) -> dict[str, StoredTensor]:
        try:
            state = _Unpickler(io.BytesIO(content)).load()
        except _BROKEN as error:
            raise UnusableCheckpoint(f"{self._path}: refused, its pickle is not plain weights ({error})") from None
        if not isinstance(state, dict):
            raise UnusableCheckpoint(f"{self._path}: holds a {type(state).__name__}; wanted a dictionary of tensors")
        if isinstance(state.get(TRAINER), dict):  # a trainer's checkpoint: optimizer, config and epoch lie beside
            state = state[TRAINER]
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
                raise UnusableCheckpoint(f"{self._path}: entry {name!r} is a {type(tensor).__name__}; wanted tensors")
            self._check_bounds(name, tensor)
        return dict(state)

    def _check_bounds(self, name: str, tensor: StoredTensor) -> None:
        storage = tensor.storage
        size = self._sizes.get(f"{self._root}data/{storage.key}")
        if size != storage.count * storage.dtype.itemsize:
            raise UnusableCheckpoint(
                f"{self._path}: tensor {name}: its storage has {size} bytes, not those of {storage}"
            )
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        inside = min([tensor.offset, *tensor.shape, *tensor.strides]) >= 0 and last < storage.count
        if not inside or math.prod(tensor.shape) > storage.count:  # an expanded tensor could ask for any memory
            raise UnusableCheckpoint(f"{self._path}: tensor {name} reaches outside its storage")


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, tensors and storages, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"it calls {f'{module}.{name}'!r}, which could run any code; ask for safetensors")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in _STORAGES or not isinstance(count, int):
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
        return Storage(str(key), _STORAGES[storage], count)


class _Call(NamedTuple):
    """A function that a pickle may call and, unlike a bare one, cannot change: BUILD sets attributes."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    whole = isinstance(storage, Storage) and all(isinstance(n, int) for n in (offset, *shape, *strides))
    if not whole or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor is not made of a storage and whole numbers")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED = {
    ("collections", "OrderedDict"): _Call(lambda *pairs: collections.OrderedDict(*pairs)),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, *_: tensor),
}


def write_torch(path: epath.PathLike, tensors: Mapping[str, np.ndarray], within: str | None = None) -> None:
    """Writes a dictionary of arrays so that `torch.load(path, weights_only=True)` reads it.

    within: the dictionary becomes the only value, under this key, of another.

    The pickle is put together by hand, since Python's pickler would import the torch names that it writes.
    """
    names = {dtype: name for name, dtype in _STORAGES.items()}
    out = io.BytesIO()
    out.write(pickle.PROTO + b"\x02")
    if within is not None:
        out.write(pickle.EMPTY_DICT + _text(within))
    out.write(pickle.EMPTY_DICT + pickle.MARK)
    for key, (name, array) in enumerate(tensors.items()):
        storage = [_text("storage"), _global("torch", names[array.dtype]), _text(str(key)), _text("cpu")]
        storage += [_int(array.size)]
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        arguments = [_tuple(storage) + pickle.BINPERSID, _int(0), _tuple(map(_int, array.shape))]
        arguments += [_tuple(map(_int, strides)), pickle.NEWFALSE]
        arguments += [_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE]
        out.write(_text(name) + _global("torch._utils", "_rebuild_tensor_v2") + _tuple(arguments) + pickle.REDUCE)
    out.write(pickle.SETITEMS + (pickle.SETITEM if within is not None else b"") + pickle.STOP)
    root, whole = epath.Path(path).stem, io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as file:
        arrays = {f"data/{key}": np.ascontiguousarray(array).tobytes() for key, array in enumerate(tensors.values())}
        for name, content in {"data.pkl": out.getvalue(), "byteorder": b"little", **arrays, "version": b"3\n"}.items():
            file.writestr(zipfile.ZipInfo(f"{root}/{name}"), content)  # without the time: the same tensors, same bytes
    files.write_whole(path, whole.getvalue())


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _int(value: int) -> bytes:
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(parts: Any) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE
