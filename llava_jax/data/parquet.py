"""Reads parquet files, and directories of Hugging Face `datasets`: of the hub (parquet) or of `save_to_disk` (Arrow).

Columns are the keys of a record; a picture is bytes, a path, or {bytes, path} as `datasets` writes it. A group of rows
is read when one of its records is asked for: files that are trained on in random order want groups of some 100 rows.
"""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from llava_jax import files, streams
from llava_jax.data.files import field, read_json
from llava_jax.data.records import Record
from llava_jax.data.sources import Source
from llava_jax.errors import DataError, Unreachable, UsageError

_SUFFIXES = (".parquet", ".arrow")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}")  # as the hub names the files of a split
# Words of a path that name a split. Source: huggingface/datasets src/datasets/data_files.py, SPLIT_KEYWORDS.
_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_KEPT_BYTES = 2**30  # of groups of rows
_DAMAGE = (pa.ArrowException, OSError, ValueError)


class _Group(NamedTuple):
    """Neighbouring rows of one file that are read together."""

    rows: int
    read: Callable[[], pa.Table | pa.RecordBatch]


class _Kept:
    """The groups that were read last, for all threads."""

    def __init__(self) -> None:
        self._lock, self._groups, self._bytes = threading.Lock(), OrderedDict[int, Any](), 0

    def get(self, number: int, group: _Group) -> pa.Table | pa.RecordBatch:
        with self._lock:  # a reader of parquet is not made for several threads
            if number not in self._groups:
                self._groups[number] = group.read()
                self._bytes += self._groups[number].nbytes
            self._groups.move_to_end(number)
            while self._bytes > _KEPT_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
            return self._groups[number]


@dataclass(frozen=True)
class TableSource(Source):
    """groups: of all files, in order. starts: int64 [groups], the first record of each."""

    groups: tuple[_Group, ...]
    starts: np.ndarray
    kept: _Kept

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        try:
            table = self.kept.get(number, self.groups[number])
            row = table.slice(index - int(self.starts[number]), 1).to_pylist()[0]
        except Unreachable:
            raise
        except _DAMAGE as error:
            return Record(self.path, index, None, None, f"the file is damaged here ({error}): get it again")
        return Record(self.path, index, None, {key: _listed(value) for key, value in row.items()})


def find(place: epath.Path, members: list[epath.Path], split: str) -> list[epath.Path]:
    """The parquet or Arrow files of a split of a data set, in order; none where `place` is no such file or directory.

    members: what lies in the directory.

    Raises:
      UsageError: there is no such split, or there are several data sets.
      DataError: the files that say what is there are damaged.
    """
    if place.suffix in _SUFFIXES:
        return [place]
    names = {member.name for member in members}
    if "dataset_dict.json" in names:
        known = field(read_json(place / "dataset_dict.json"), "splits", list, str(place))
        if split not in known:
            raise _no_split(place, split, known)
        return find(place / split, files.listed(place / split), split)
    if "state.json" in names:
        rows = field(read_json(place / "state.json"), "_data_files", list, str(place))
        return [place / field(row, "filename", str, f"{place}/state.json") for row in rows]
    found = _tables(members)
    splits = {path: _split_of(path, place) for path in found}
    chosen = [path for path in found if splits[path] in (split, None)]
    if found and not chosen:
        raise _no_split(place, split, sorted(set(splits.values())))
    folders = sorted({str(path.parent) for path in chosen})
    if len(folders) > 1:
        raise UsageError(f"{place} holds several data sets ({', '.join(folders)}): name one of them")
    return chosen


def _tables(members: list[epath.Path]) -> list[epath.Path]:
    """The parquet files among the members of a directory; where there are none, those one level down, or two."""
    for _ in range(3):
        found = [member for member in members if member.suffix == ".parquet"]
        if found or any(member.name == "features.json" for member in members):  # the latter is of TFDS
            return found
        folders = [member for member in members if files.is_dir(member)]
        members = [entry for folder in folders for entry in files.listed(folder)]
    return []


def _split_of(path: epath.Path, place: epath.Path) -> str | None:
    """The split that a file's name or its folders' names say; None: they say nothing."""
    if numbered := _NUMBERED.match(path.stem):
        return numbered[1]
    words = re.split(r"[^a-z]+", str(path.relative_to(place)).lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _no_split(place: epath.Path, split: str, known: Iterable[str | None]) -> UsageError:
    return UsageError(f"{place}: split {split!r} does not exist: choose one of {', '.join(map(str, known))}, or name a "
                      "file")  # fmt: skip


def open_tables(
    place: epath.Path, paths: list[epath.Path], images: epath.Path | None, name: str, weight: float | int
) -> TableSource:
    """The rows of all files.

    The fingerprint covers what the files' footers say of them (parquet), or their schema and size (Arrow).

    Raises:
      DataError: a file is no parquet or Arrow file, or has neither conversations nor messages; names it.
      UsageError: an Arrow file lies in a bucket.
    """
    digest, groups = hashlib.sha256(), list[_Group]()
    for path in paths:
        if path.suffix == ".arrow":
            files.want_disk(path, "data source", "Arrow files are mapped into memory")
        try:
            summary, schema, opened = (_open_arrow if path.suffix == ".arrow" else _open_parquet)(path)
        except Unreachable:
            raise
        except _DAMAGE as error:
            raise DataError(f"{path}: no whole {path.suffix[1:]} file ({error}): get it again") from None
        if not {"conversations", "messages"} & set(schema.names):
            raise DataError(f"{path}: columns are {', '.join(schema.names)}: want conversations or messages, and image "
                            "or images where there are any")  # fmt: skip
        digest.update(summary)
        groups += opened
    starts = np.cumsum([0, *(group.rows for group in groups)])[:-1]
    return TableSource(name, str(place), images, weight, digest.hexdigest(), tuple(groups), starts, _Kept())


def _open_parquet(path: epath.Path) -> tuple[bytes, pa.Schema, list[_Group]]:
    opened = pa.PythonFile(streams.open_read(path), "r") if files.is_bucket(path) else os.fspath(path)
    file = pq.ParquetFile(opened, memory_map=not files.is_bucket(path))
    size = files.size_bytes(path)
    footer = files.read_range(path, size - 8 - file.metadata.serialized_size, None)
    groups = [
        _Group(file.metadata.row_group(number).num_rows, lambda number=number: file.read_row_group(number))
        for number in range(file.metadata.num_row_groups)
    ]
    return footer, file.schema_arrow, groups


def _open_arrow(path: epath.Path) -> tuple[bytes, pa.Schema, list[_Group]]:
    """The batches of a file, which stay on the disk until they are used."""
    mapped = pa.memory_map(os.fspath(path))
    try:
        table = pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:  # `datasets` writes streams, others write files
        table = pa.ipc.open_file(mapped).read_all()
    groups = [_Group(batch.num_rows, lambda batch=batch: batch) for batch in table.to_batches()]
    return f"{table.schema} {mapped.size()}".encode(), table.schema, groups


def _listed(value: Any) -> Any:
    """A list of objects, where `datasets` keeps it as an object of lists: a `Sequence` of features."""
    lists = isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values())
    if not lists or len(set(map(len, value.values()))) != 1:
        return value
    return [dict(zip(value, row)) for row in zip(*value.values())]

