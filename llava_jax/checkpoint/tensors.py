"""Reads the parameters of one `params` directory, as Orbax (any of its array layouts) or `TensorWriter` made it.

Bits that flip on a disk are noticed by neither Orbax nor Zarr: what is read here is compared with the checksums that
were written with it.
"""

import functools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tensorstore
from etils import epath

from llava_jax import files, lifecycle
from llava_jax.checkpoint import record, sums
from llava_jax.checkpoint.model_json import read_json
from llava_jax.checkpoint.sums import Sums
from llava_jax.errors import UnusableCheckpoint, UsageError

T = TypeVar("T")

CHECKSUMS, METADATA = "_CHECKSUMS", "_METADATA"
COMMIT = "commit_success.txt"  # Orbax's: in a bucket, a step or an item of it without this object is not finished
# [sum, sum, dtype] as `sums.of_arrays` gives it (steps of format 1: without dtype), or, of format 1, a CRC-32.
Checksum = int | Sequence[Any]
Box = tuple[tuple[int, int], ...]  # a part of an array: (begin, end) in each dimension

# Host memory of `read`: the boxes of one array, or of several up to AHEAD_BYTES, and WORKERS pieces in flight. A piece
# is a row of chunks (TensorWriter: a layer or some; Orbax: what a device held).
WORKERS = 4
AHEAD_BYTES = 2**29
# TensorStore's own default is 32 retries, a quarter of an hour; `files.retried` goes on where these end.
_RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "8s"}


@dataclass(frozen=True)
class Tensors:
    """An opened `params` directory.

    Attributes:
      checksums: by name; empty where nobody wrote them.
    """

    folder: epath.Path
    names: tuple[str, ...]
    ocdbt: bool
    zarr3: bool
    checksums: Mapping[str, Checksum]

    def spec(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype; no array is read."""
        store = self.store(name)
        return jax.ShapeDtypeStruct(tuple(store.shape), store.dtype.numpy_dtype)

    def read(self, name: str) -> np.ndarray:
        """A parameter in the dtype it has on disk.

        Raises:
          UnusableCheckpoint: the parameter is missing, damaged, or differs from its checksum.
          Unreachable, UsageError: as `files.retried`.
        """
        return read([Request(self, name)], Read.whole)[0]

    def is_whole(self) -> bool:
        """Whether everything is there that a restore begins with; the content is checked when it is read."""
        needed = ["manifest.ocdbt"] if self.ocdbt else [name.replace("/", ".") for name in self.names]
        if self.ocdbt or files.is_bucket(self.folder):
            return {entry.name for entry in files.listed(self.folder)}.issuperset(needed)
        head = "zarr.json" if self.zarr3 else ".zarray"
        return all((self.folder / name / head).exists() for name in needed)

    def store(self, name: str) -> tensorstore.TensorStore:
        """The opened array. All arrays are opened together, since a bucket answers each one slowly.

        Raises:
          UnusableCheckpoint: there is none, or its metadata is damaged.
        """
        if name not in self.names:
            shown = ", ".join(self.names[:3])
            raise UnusableCheckpoint(f"{self.folder}: no parameter {name}; it holds {len(self.names)}, such as {shown}")
        return self._stores[name].result()

    def damaged(self, name: str, what: str) -> UnusableCheckpoint:
        """What to raise of a parameter."""
        return UnusableCheckpoint(
            f"{self.folder}: parameter {name} is damaged: {what}; copy the checkpoint again, or use another step"
        )

    @functools.cached_property
    def _stores(self) -> Mapping[str, Future[tensorstore.TensorStore]]:
        context = tensorstore.Context()
        with ThreadPoolExecutor(4 * WORKERS) as pool:
            return {name: pool.submit(self._open, name, context) for name in self.names}

    def _open(self, name: str, context: tensorstore.Context) -> tensorstore.TensorStore:
        array = name.replace("/", ".")
        place = kvstore(self.folder / array)
        if self.ocdbt:
            place = {"driver": "ocdbt", "base": kvstore(self.folder), "path": array + "/"}
        spec = {"driver": "zarr3" if self.zarr3 else "zarr", "kvstore": place}
        call = functools.partial(tensorstore.open, spec, open=True, read=True, context=context)
        return self.attempt(name, lambda: call().result())

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What a call of TensorStore returns about a parameter; errors that do not pass are damage."""
        try:
            return files.retried(call, self.folder)
        except UsageError:
            raise
        except (ValueError, IndexError, NotImplementedError) as error:
            raise self.damaged(name, str(error).split(" [")[0].strip()) from None


class Request(NamedTuple):
    """A parameter to read: whole, or only these boxes of it, which do not overlap."""

    leaves: Tensors
    name: str
    boxes: Sequence[Box] | None = None


@dataclass(frozen=True)
class Read:
    """A parameter that was read, or parts of it.

    Attributes:
      arrays: what was read, by place; the boxes of the request lie in them.
      sums: of the boxes that were requested; empty where the checksum is a CRC-32, or there is none.
    """

    name: str
    shape: tuple[int, ...]
    arrays: Mapping[Box, np.ndarray]
    sums: Mapping[Box, Sums]

    def take(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part of the parameter at an index, without a copy; it must lie in a box that was requested."""
        part = box_of(index, self.shape)
        outer = next(box for box in self.arrays if all(b <= i and j <= e for (i, j), (b, e) in zip(part, box)))
        return self.arrays[outer][_inside(part, outer)]

    def whole(self) -> np.ndarray:
        """The parameter, where it was read whole."""
        return self.take((slice(None),) * len(self.shape))

    def astype(self, dtype: Any) -> "Read":
        """The same in another dtype."""
        return replace(self, arrays={box: array.astype(dtype, copy=False) for box, array in self.arrays.items()})


def read(requests: Sequence[Request], use: Callable[[Read], T]) -> list[T]:
    """What `use` makes of each parameter, in their order. Several are read at a time; whole ones are compared with
    their checksums.

    A parameter's memory is free again once `use` has returned, if nothing of what it returns holds it.

    Raises:
      UnusableCheckpoint: a parameter is missing, damaged, or differs from its checksum.
      Unreachable, UsageError: as `files.retried`.
    """
    pool = ThreadPoolExecutor(WORKERS)
    used: list[T] = []
    try:
        ahead: deque[_Begun] = deque()
        for request in [*requests, None]:
            while ahead and (request is None or sum(one.nbytes for one in ahead) + _nbytes(request) > AHEAD_BYTES):
                used.append(use(ahead.popleft().finish()))
                lifecycle.beat()
            if request is not None:
                ahead.append(_begin(pool, request))
        return used
    finally:
        pool.shutdown(cancel_futures=True)


class _Begun(NamedTuple):
    request: Request
    boxes: Sequence[Box]
    nbytes: int
    arrays: dict[Box, np.ndarray]
    pieces: list[Future[dict[Box, Sums]]]

    def finish(self) -> Read:
        leaves, name, _ = self.request
        parts: dict[Box, list[Sums]] = {}
        for piece in self.pieces:
            for box, found in piece.result().items():
                parts.setdefault(box, []).append(found)
        found = {box: sums.total(several) for box, several in parts.items()}
        spec = leaves.spec(name)
        if sum(map(_size, self.boxes)) == math.prod(spec.shape):
            _compare(self.request, spec, found, self.arrays)
        return Read(name, spec.shape, dict(self.arrays), found)


def _begin(pool: ThreadPoolExecutor, request: Request) -> _Begun:
    leaves, name, boxes = request
    store, written = leaves.store(name), leaves.checksums.get(name)
    if boxes is None or isinstance(written, int):  # a CRC-32 is of the whole
        boxes = [tuple((0, size) for size in store.shape)]
    chunk = store.chunk_layout.read_chunk.shape or store.shape
    begun = _Begun(request, boxes, _nbytes(request), {}, [])
    summed = [] if written is None or isinstance(written, int) else boxes
    for outer in _merged(boxes, chunk):
        array = np.empty([end - begin for begin, end in outer], store.dtype.numpy_dtype)
        begun.arrays[outer] = array
        for piece in _pieces(outer, chunk):
            begun.pieces.append(pool.submit(_read_piece, leaves, name, summed, piece, array[_inside(piece, outer)]))
    return begun


def _read_piece(leaves: Tensors, name: str, boxes: Sequence[Box], piece: Box, target: np.ndarray) -> dict[Box, Sums]:
    """Fills `target`; the sums of the boxes' parts in it."""
    store = leaves.store(name)
    index = tuple(slice(begin, end) for begin, end in piece)
    target[...] = leaves.attempt(name, lambda: store[index].read().result())
    found = {}
    for box in boxes:
        common = tuple((max(b, i), min(e, j)) for (b, e), (i, j) in zip(box, piece))
        if all(begin < end for begin, end in common):
            part = target[_inside(common, piece)]
            found[box] = sums.of_part(part, [begin for begin, _ in common], store.shape)
    return found


def _compare(
    request: Request, spec: jax.ShapeDtypeStruct, found: Mapping[Box, Sums], arrays: Mapping[Box, np.ndarray]
) -> None:
    leaves, name, _ = request
    written = leaves.checksums.get(name)
    if isinstance(written, int):
        (whole,) = arrays.values()
        if crc32(whole) != written:
            raise leaves.damaged(name, "its bytes differ from their CRC-32")
    elif written is not None and not matches(written, spec.dtype, found.values()):
        raise leaves.damaged(name, "its bytes differ from their checksum")


def crc32(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order: the checksum of format 1."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def matches(written: Checksum, dtype: Any, parts: Iterable[Sums]) -> bool:
    """Whether the sums of all parts of a parameter are those that were written for it."""
    first, second, *kind = written
    return (first, second) == sums.total(parts) and kind in ([], [str(np.dtype(dtype))])


def open_tensors(folder: epath.Path, checksums: Mapping[str, Checksum] | None = None) -> Tensors:
    """Reads a `params` directory's `_METADATA` and checksums.

    Args:
      checksums: None takes those beside the arrays, or of the training step that the directory belongs to.

    Raises:
      UnusableCheckpoint: there are none, or they are damaged.
      Unreachable, UsageError: as `files.retried`.
    """
    try:
        content = read_json(folder / METADATA)
        entries = content["tree_metadata"].values()
        names = sorted("/".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries)
        ocdbt, zarr3 = bool(content["use_ocdbt"]), bool(content["use_zarr3"])
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UnusableCheckpoint(f"{folder}: its {METADATA} cannot be read ({what})") from None
    checksums = _checksums(folder) if checksums is None else checksums
    if checksums and set(checksums) != set(names):
        odd = sorted(set(checksums) ^ set(names))
        raise UnusableCheckpoint(f"{folder}: {METADATA} and the checksums name other parameters, such as {odd[0]}")
    return Tensors(folder, tuple(names), ocdbt, zarr3, checksums)


def _checksums(folder: epath.Path) -> dict[str, Checksum]:
    path = folder / CHECKSUMS
    try:
        found = read_json(path)
    except FileNotFoundError:
        step = record.read(folder.parent)
        prefix = f"{folder.name}/"
        found = {} if step is None else step[1]
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if not isinstance(found, dict) or not all(_is_checksum(value) for value in found.values()):
        raise UnusableCheckpoint(f"{path}: these are no checksums; copy the checkpoint again, or use another step")
    return found


def _is_checksum(value: Any) -> bool:
    if isinstance(value, list):
        return [type(item) for item in value] in ([int, int], [int, int, str])
    return type(value) is int


def kvstore(path: epath.Path) -> dict[str, Any]:
    """TensorStore's name of a directory."""
    if files.is_bucket(path):
        bucket, _, inside = str(path).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": inside + "/", "gcs_request_retries": _RETRIES}
    return {"driver": "file", "path": str(path.resolve()) + "/"}


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """An index as (begin, end) in each dimension."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _nbytes(request: Request) -> int:
    store = request.leaves.store(request.name)
    count = math.prod(store.shape) if request.boxes is None else sum(map(_size, request.boxes))
    return store.dtype.numpy_dtype.itemsize * count


def _size(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)


def _inside(part: Box, outer: Box) -> tuple[Any, ...]:
    """Where a part lies in an array that begins where `outer` does; always an index that gives a view."""
    return (*(slice(begin - first, end - first) for (begin, end), (first, _) in zip(part, outer)), ...)


def _merged(boxes: Sequence[Box], chunk: Sequence[int]) -> list[Box]:
    """The boxes; those that share a chunk as one box around them, so that no chunk is read twice."""
    merged: list[Box] = []
    for box in boxes:
        while near := next((other for other in merged if _share_a_chunk(box, other, chunk)), None):
            merged.remove(near)
            box = tuple((min(b, i), max(e, j)) for (b, e), (i, j) in zip(box, near))
        merged.append(box)
    return merged


def _share_a_chunk(one: Box, two: Box, chunk: Sequence[int]) -> bool:
    return all(b // size <= (j - 1) // size and i // size <= (e - 1) // size
               for (b, e), (i, j), size in zip(one, two, chunk))  # fmt: skip


def _pieces(box: Box, chunk: Sequence[int]) -> list[Box]:
    """The box cut along its first dimension where chunks end: read at once, TensorStore holds it twice."""
    if not box:
        return [box]
    (begin, end), *rest = box
    bounds = [begin, *range((begin // chunk[0] + 1) * chunk[0], end, chunk[0]), end]
    return [((first, last), *rest) for first, last in zip(bounds, bounds[1:])]
