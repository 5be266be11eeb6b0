"""The leaves of one parameter tree on disk, one at a time, in Orbax's own PyTree layout.

Orbax's tree save needs twice the tree in memory; a 7B model then does not convert on a 24 GiB machine. So
leaves are written one by one (one Zarr array each), and an ordinary Orbax restore reads the result. Bits that
flip on a disk are noticed by neither Orbax nor Zarr: `_CHECKSUMS` beside the arrays holds a CRC-32 for each
leaf, and every whole leaf read here is compared with it.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from etils import epath

from llava_jax.checkpoint.card import write_whole
from llava_jax.errors import UnusableCheckpoint, UsageError

CHECKSUMS = "_CHECKSUMS"
# A chunk is one file. A layer of a 7B or 13B stack fits in one (4,096 x 11,008 bf16 is 90 MB), so that reading
# one layer reads one file, and what is in flight beside the leaf itself stays small.
CHUNK_BYTES = 128 * 2**20

_DTYPES = {
    "float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16", "float64": "<f8",
    "int32": "<i4", "int64": "<i8", "uint32": "<u4", "uint8": "|u1", "int8": "|i1", "bool": "|b1",
}  # fmt: skip


class LeafWriter:
    """Writes parameters to `path` (`DIR/STEP/params`) leaf by leaf; `path` appears when `close` has succeeded.

    with LeafWriter(directory / "0" / "params") as writer:
        writer.write("llm/norm/scale", scale)

    Memory: nothing beside the caller's leaf but one chunk (`CHUNK_BYTES`).
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        if self._path.exists():
            raise UsageError(f"{self._path} exists already: name a new directory, or delete it first")
        self._partial = partial_of(self._path)
        self._metadata: dict[str, Any] = {}
        self._checksums: dict[str, int] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one leaf in its own dtype.

        Raises:
          ValueError: a second leaf of that name, an empty one, or a dtype that is not stored.
        """
        if name in self._checksums:
            raise UsageError(f"leaf {name} is written twice")
        if array.dtype.name not in _DTYPES:
            raise UsageError(f"leaf {name} has dtype {array.dtype}; wanted one of {', '.join(_DTYPES)}")
        if array.size == 0:
            raise UsageError(f"leaf {name} has shape {array.shape}, which is empty; leave it out")
        keys = name.split("/")
        chunk = _chunk_shape(array.shape, array.dtype.itemsize)
        metadata = {
            "shape": array.shape, "chunks": chunk, "dtype": _DTYPES[array.dtype.name],
            "compressor": None, "dimension_separator": ".", "fill_value": None, "order": "C",
        }  # fmt: skip
        spec = {"driver": "zarr", "kvstore": _kvstore(self._partial / ".".join(keys)), "metadata": metadata}
        spec["store_data_equal_to_fill_value"] = True  # else zeros make no file, and look like a lost one
        store = tensorstore.open(spec, create=True).result()
        for part in _parts(array.shape, chunk):
            store[part].write(array[part]).result()
        self._checksums[name] = checksum(array)
        self._metadata[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dictionary's key
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(array.shape)},
        }

    def close(self) -> None:
        """Writes the tree's metadata and the checksums, then gives the directory its final name."""
        if not self._checksums:
            raise UsageError(f"{self._path}: no leaf was written")
        tree = {"tree_metadata": self._metadata, "use_ocdbt": False, "use_zarr3": False}
        tree |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        (self._partial / CHECKSUMS).write_text(json.dumps(self._checksums, indent=1))
        (self._partial / "_METADATA").write_text(json.dumps(tree))
        self._partial.rename(self._path)

    def discard(self) -> None:
        """Deletes what was written so far."""
        self._partial.rmtree(missing_ok=True)

    def __enter__(self) -> "LeafWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class Leaves(NamedTuple):
    """An opened `params` directory, as Orbax (any of its array layouts) or `LeafWriter` made it.

    Attributes:
      checksums: by name; empty where nobody wrote them (`store.seal` does).
    """

    folder: epath.Path
    names: tuple[str, ...]
    ocdbt: bool
    zarr3: bool
    checksums: Mapping[str, int]

    def spec(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype; no array is read."""
        store = self._open(name)
        return jax.ShapeDtypeStruct(tuple(store.shape), store.dtype.numpy_dtype)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A leaf in the dtype it has on disk, or only the part `index` of it.

        A whole leaf is compared with its checksum; a part cannot be.

        Raises:
          UnusableCheckpoint: the leaf is missing, damaged, or differs from its checksum.
        """
        store = self._open(name)
        try:
            array = _read_whole(store) if index is None else np.asarray(store[index].read().result())
        except ValueError as error:
            raise self._damaged(name, _first_words(error)) from None
        wanted = self.checksums.get(name)
        if index is None and wanted is not None and checksum(array) != wanted:
            raise self._damaged(name, f"its bytes have CRC-32 {checksum(array)}, {wanted} was written")
        return array

    def is_whole(self) -> bool:
        """Whether every file is there that a restore begins with; their content is checked when it is read."""
        if self.ocdbt:
            return (self.folder / "manifest.ocdbt").exists()
        head = "zarr.json" if self.zarr3 else ".zarray"
        return all((self.folder / name.replace("/", ".") / head).exists() for name in self.names)

    def _open(self, name: str) -> tensorstore.TensorStore:
        if name not in self.names:
            shown = ", ".join(self.names[:3])
            raise UnusableCheckpoint(f"{self.folder}: no leaf {name}; it holds {len(self.names)}, such as {shown}")
        array = name.replace("/", ".")
        kvstore = _kvstore(self.folder / array)
        if self.ocdbt:
            kvstore = {"driver": "ocdbt", "base": _kvstore(self.folder), "path": array + "/"}
        try:
            spec = {"driver": "zarr3" if self.zarr3 else "zarr", "kvstore": kvstore}
            return tensorstore.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise self._damaged(name, _first_words(error)) from None

    def _damaged(self, name: str, what: str) -> UnusableCheckpoint:
        return UnusableCheckpoint(
            f"{self.folder}: leaf {name} is damaged: {what}; copy the checkpoint again, or use another step"
        )


def open_leaves(folder: epath.Path) -> Leaves:
    """Reads a `params` directory's `_METADATA` and checksums; raises UnusableCheckpoint where there are none."""
    try:
        content = json.loads((folder / "_METADATA").read_text())
        entries = content["tree_metadata"].values()
        names = sorted("/".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries)
        ocdbt, zarr3 = bool(content["use_ocdbt"]), bool(content["use_zarr3"])
        sums = folder / CHECKSUMS
        checksums = dict(json.loads(sums.read_text())) if sums.exists() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UnusableCheckpoint(f"{folder}: its _METADATA or {CHECKSUMS} cannot be read ({what})") from None
    return Leaves(folder, tuple(names), ocdbt, zarr3, checksums)


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write_checksums(folder: epath.Path, checksums: Mapping[str, int]) -> None:
    """Writes checksums (`checksum(leaf)` by name) into a finished `params` directory."""
    write_whole(folder / CHECKSUMS, json.dumps(dict(checksums), indent=1).encode())


@contextlib.contextmanager
def staged(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A new directory to fill; it gets its name when the block ends well, and is deleted when it does not.

    Raises:
      ValueError: `directory` exists already.
    """
    final = epath.Path(directory)
    if final.exists():
        raise UsageError(f"{final} exists already and is not overwritten: name a new directory, or delete it first")
    partial = partial_of(final)
    try:
        yield partial
        partial.rename(final)
    finally:
        partial.rmtree(missing_ok=True)


def partial_of(path: epath.Path) -> epath.Path:
    """The empty hidden directory in which `path` is made; what a killed run left there is deleted."""
    partial = path.parent / f".{path.name}.partial"
    partial.rmtree(missing_ok=True)
    partial.mkdir(parents=True)
    return partial


def _kvstore(path: epath.Path) -> dict[str, Any]:
    if str(path).startswith("gs://"):
        bucket, _, inside = str(path).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": inside + "/"}
    return {"driver": "file", "path": str(path.resolve()) + "/"}


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The leading axis cut into parts of at most `CHUNK_BYTES` (the next axis too where one row is larger)."""
    chunk = list(shape)
    for axis in range(len(shape)):
        row_bytes = itemsize * math.prod(shape[axis + 1 :])
        chunk[axis] = max(1, min(shape[axis], CHUNK_BYTES // row_bytes))
        if row_bytes <= CHUNK_BYTES:
            break
    return chunk


def _read_whole(store: tensorstore.TensorStore) -> np.ndarray:
    """A leaf, one row of chunks at a time: read at once, TensorStore holds it twice."""
    array = np.empty(store.shape, store.dtype.numpy_dtype)
    for part in _parts(store.shape, store.chunk_layout.read_chunk.shape):
        array[part] = store[part].read().result()
    return array


def _parts(shape: tuple[int, ...], chunk: Sequence[int] | None) -> list[Any]:
    """Indices along the leading axis, one row of chunks each."""
    if not shape or not chunk:
        return [...]
    return [slice(start, min(start + chunk[0], shape[0])) for start in range(0, shape[0], chunk[0])]


def _first_words(error: ValueError) -> str:
    """TensorStore's message without the specification that it appends."""
    return str(error).split(" [")[0].strip()
