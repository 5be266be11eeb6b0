"""Writes one parameter tree, a parameter at a time, in Orbax's own PyTree layout; and directories that appear whole.

Orbax's tree save needs twice the tree in memory; a 7B model then does not convert on a 24 GiB machine. So arrays are
written one by one (one Zarr array each), and an ordinary Orbax restore reads the result.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from llava_jax import files, lifecycle
from llava_jax.checkpoint import sums
from llava_jax.checkpoint.tensors import CHECKSUMS, COMMIT, METADATA, kvstore
from llava_jax.errors import UsageError

# A chunk is one file. The last two axes are those that meshes cut: a process that holds a part of them reads little
# else. Axes are not cut where the whole array is small.
CHUNK_BYTES = 4 * 2**20
CUTS = 4
UNCUT_BYTES = 2**20
PARTIAL = ".partial"

_DTYPES = {
    "float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16", "float64": "<f8",
    "int32": "<i4", "int64": "<i8", "uint32": "<u4", "uint8": "|u1", "int8": "|i1", "bool": "|b1",
}  # fmt: skip


class TensorWriter:
    """Writes parameters to `path` (`DIR/STEP/params`) tensor by tensor; readers see it when `close` has succeeded.

    with TensorWriter(directory / "0" / "params") as writer:
        writer.write("llm/norm/scale", scale)

    On a disk the directory is renamed at the end. In a bucket, where a rename is a copy, objects have their final names
    from the start, and Orbax's commit file is the last. Memory: the caller's parameter and a row of chunks.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._is_bucket = files.is_bucket(self._path)
        if files.exists(self._path / COMMIT if self._is_bucket else self._path):
            raise UsageError(f"{self._path} exists already: name a new directory, or delete it first")
        self._partial = self._path if self._is_bucket else partial_of(self._path)
        if self._is_bucket:  # what a killed run left
            files.delete(self._path)
        self._metadata: dict[str, Any] = {}
        self._checksums: dict[str, list[Any]] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one parameter in its own dtype; may be called in several threads.

        Raises:
          UsageError: a second parameter of that name, an empty one, or a dtype that is not stored.
        """
        if name in self._checksums:
            raise UsageError(f"parameter {name} is written twice")
        if array.dtype.name not in _DTYPES:
            raise UsageError(f"parameter {name} has dtype {array.dtype}; wanted one of {', '.join(_DTYPES)}")
        if array.size == 0:
            raise UsageError(f"parameter {name} has shape {array.shape}, which is empty; leave it out")
        keys = name.split("/")
        chunk = _chunk_shape(array.shape, array.dtype.itemsize)
        metadata = {
            "shape": array.shape, "chunks": chunk, "dtype": _DTYPES[array.dtype.name],
            "compressor": None, "dimension_separator": ".", "fill_value": None, "order": "C",
        }  # fmt: skip
        spec = {"driver": "zarr", "kvstore": kvstore(self._partial / ".".join(keys)), "metadata": metadata}
        spec["store_data_equal_to_fill_value"] = True  # else zeros make no file, and look like a lost one
        store = files.retried(lambda: tensorstore.open(spec, create=True, open=True).result(), self._path)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(sums.of_part, array, [0] * array.ndim, array.shape)
            for rows in _rows(array.shape, chunk):
                files.retried(lambda rows=rows: store[rows].write(array[rows]).result(), self._path)
                lifecycle.beat()
        self._checksums[name] = [*found.result(), array.dtype.name]
        self._metadata[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dictionary's key
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(array.shape)},
        }

    def close(self) -> None:
        """Writes the tree's metadata and the checksums, then makes the directory visible to readers."""
        if not self._checksums:
            raise UsageError(f"{self._path}: no parameter was written")
        tree = {"tree_metadata": dict(sorted(self._metadata.items())), "use_ocdbt": False, "use_zarr3": False}
        tree |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        files.write_whole(self._partial / CHECKSUMS, json.dumps(self._checksums, indent=1, sort_keys=True).encode())
        files.write_whole(self._partial / METADATA, json.dumps(tree).encode())
        if self._is_bucket:
            for folder in (self._path, self._path.parent):  # Orbax looks for it in a step and in its items
                files.write_whole(folder / COMMIT, f"Checkpoint commit was successful to {folder}".encode())
        else:
            self._partial.rename(self._path)

    def discard(self) -> None:
        """Deletes what was written so far."""
        files.delete(self._partial)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


@contextlib.contextmanager
def staged(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A new directory to fill; it gets its name when the block ends well, and is deleted when it does not.

    In a bucket it has its name from the start, and holds an object ".partial" until it is complete: without that
    nothing there is complete, and the next attempt deletes it.

    Raises:
      UsageError: `directory` exists already.
    """
    final = epath.Path(directory)
    is_bucket = files.is_bucket(final)
    mark = final / PARTIAL
    if files.exists(final) and not (is_bucket and files.exists(mark)):
        raise UsageError(f"{final} exists already and is not overwritten: name a new directory, or delete it first")
    if is_bucket:
        files.delete(final)
        files.write_whole(mark, b"being written; delete the directory if nobody writes it any more")
    partial = final if is_bucket else partial_of(final)
    complete = False
    try:
        yield partial
        if is_bucket:
            files.delete(mark)
        else:
            partial.rename(final)
        complete = True
    finally:
        if not complete:
            files.delete(partial)


def partial_of(path: epath.Path) -> epath.Path:
    """The empty hidden directory in which `path` is made; what a killed run left there is deleted."""
    partial = path.parent / f".{path.name}{PARTIAL}"
    files.delete(partial)
    partial.mkdir(parents=True)
    return partial


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The last two axes in `CUTS` parts where that divides them, then the leading ones to `CHUNK_BYTES`."""
    chunk = list(shape)
    if itemsize * math.prod(shape) > UNCUT_BYTES:
        for axis in range(max(0, len(shape) - 2), len(shape)):
            chunk[axis] //= math.gcd(chunk[axis], CUTS)
    for axis in range(len(shape)):
        row_bytes = itemsize * math.prod(chunk[axis + 1 :])
        chunk[axis] = max(1, min(chunk[axis], CHUNK_BYTES // row_bytes))
        if row_bytes <= CHUNK_BYTES:
            break
    return chunk


def _rows(shape: tuple[int, ...], chunk: list[int]) -> list[Any]:
    """Indices along the leading axis, one row of chunks each."""
    if not shape:
        return [...]
    return [slice(begin, min(begin + chunk[0], shape[0])) for begin in range(0, shape[0], chunk[0])]
