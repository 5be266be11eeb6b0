"""Where records come from: LLaVA JSON, JSON lines, a TFDS directory or tar shards, read by record number.

A source keeps its file as bytes and parses one record when asked: 665,298 records take the file's own size in
memory, where parsed objects take several times that.
"""

import abc
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.errors import DataError, MissingFile, UsageError
from llava_jax.prompt.conversation import Conversation, from_record

_KINDS = ".json (one list), .jsonl (a record a line), a TFDS directory, .tar or a directory of .tar"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Record:
    """One record as it was written.

    path: the file; index: place in the source, from 0; line: in JSON lines, from 1, else None.
    raw: the parsed JSON value, whatever it is.
    pictures: encoded images that come with the record (TFDS, shards); empty when `raw["image"]` names files.
    fault: why the record cannot be read; "" where it can.
    """

    path: str
    index: int
    line: int | None
    raw: Any
    pictures: tuple[bytes, ...] = ()
    fault: str = ""

    @property
    def where(self) -> str:
        """`records.json[16]` (index) or `records.jsonl:17` (line)."""
        return f"{self.path}[{self.index}]" if self.line is None else f"{self.path}:{self.line}"

    @property
    def id(self) -> str:
        """The record's own id; where it stands if it has none."""
        return str(self.raw.get("id", self.where)) if isinstance(self.raw, dict) else self.where

    @property
    def conversation(self) -> Conversation:
        """The record's turns and images.

        Raises:
          ValueError: the record has another shape, or a fault; names it.
        """
        if self.fault:
            raise DataError(f"{self.where} id={self.id!r}: {self.fault}")
        conversation = from_record(self.raw, self.where)
        if not self.pictures:
            return conversation
        return Conversation(
            conversation.turns, self.pictures, conversation.id, conversation.system, conversation.images_in_place
        )


@dataclass(frozen=True)
class Source(abc.ABC):
    """Records of one file or directory. One that is damaged is a record with a fault: it costs the others nothing.

    name: for messages. images: the folder that image paths are relative to, or None.
    weight: how often each record is seen in an epoch, on average.
    fingerprint: sha256 of the content; what it was called or where it lay does not count.
    """

    name: str
    path: str
    images: epath.Path | None
    weight: float | int
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def text(self, index: int) -> Record:
        """The record with empty bytes for each picture that comes with it, where that spares reading the picture."""
        return self[index]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class Broken(NamedTuple):
    """A line of a JSON lines file that is no JSON."""

    index: int
    line: int
    detail: str


@dataclass(frozen=True)
class JsonSource(Source):
    """data: the whole file; starts, ends: int64 [n] byte offsets of the records; lines: int64 [n] for JSON lines.

    broken: lines that did not parse; their records are left out of the source.
    """

    data: bytes
    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None
    broken: tuple[Broken, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        raw = json.loads(self.data[self.starts[index] : self.ends[index]].decode())
        return Record(self.path, index, None if self.lines is None else int(self.lines[index]), raw)


def open_source(
    path: epath.PathLike, images: epath.PathLike | None = None, name: str = "", weight: float | int = 1.0,
    split: str = "train", keep_broken: bool = False,
) -> Source:  # fmt: skip
    """Records of a `.json` list, a `.jsonl` file (one record a line), a TFDS directory or (a directory of) tar shards.

    Args:
      path: local or gs://.
      images: folder of the image files; not for TFDS and shards, which hold their images.
      name: for messages; the file's name if empty.
      weight: 2 shows each record twice an epoch, 0.5 another half of the records each epoch.
      split: of a TFDS directory.
      keep_broken: return JSON lines that are no JSON in `.broken` instead of raising.

    Raises:
      FileNotFoundError: the path or the image folder does not exist.
      DataError: the file is no JSON (names line and column), has no records, or the directory is no TFDS data set.
      ValueError: a suffix that is not known, or a weight at which no record is shown.
    """
    place, folder = epath.Path(path), epath.Path(images) if images else None
    if not place.exists():
        raise MissingFile(f"data source {str(path)!r} does not exist: want {_KINDS}")
    if folder is not None and not folder.is_dir():
        raise MissingFile(f"image folder {str(images)!r} of {str(path)!r} is no directory")
    name = name or place.name
    if place.suffix == ".tar" or (place.is_dir() and any(place.glob("*.tar"))):
        from llava_jax.data import shards  # here only: it builds upon this module

        source: Source = shards.open_shards(place, name, weight)
    elif place.is_dir():
        from llava_jax.data import tfds  # here only: it takes a second that JSON readers need not wait

        source = tfds.open_tfds(place, name, weight, split)
    elif place.suffix == ".json":
        source = _open_list(place, folder, name, weight)
    elif place.suffix == ".jsonl":
        source = _open_lines(place, folder, name, weight, keep_broken)
    else:
        raise UsageError(f"data source {str(path)!r}: want {_KINDS}")
    if not len(source) and not keep_broken:
        raise DataError(f"{place}: holds no records")
    if weight <= 0 or (len(source) and round(len(source) * weight) < 1):
        raise UsageError(f"data source {name!r}: weight={weight} shows none of its {len(source)} records an epoch")
    return source


def _open_list(path: epath.Path, images: epath.Path | None, name: str, weight: float | int) -> JsonSource:
    data, text = _read(path)
    bounds = np.asarray(list(_elements(path, text)), np.int64).reshape(-1, 2)
    if not text.isascii():  # offsets in characters become offsets in bytes, piece by piece
        marks = bounds.reshape(-1)
        pieces = zip(np.concatenate([[0], marks[:-1]]).tolist(), marks.tolist())
        bounds = np.cumsum([len(text[a:b].encode()) for a, b in pieces], dtype=np.int64).reshape(-1, 2)
    return JsonSource(name, str(path), images, weight, _hash(data), data, bounds[:, 0], bounds[:, 1], None, ())


def _elements(path: epath.Path, text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each element of the one list in `text`, in characters."""
    decode = json.JSONDecoder().raw_decode
    place = _space(text, 0)
    if text[place : place + 1] != "[":
        raise DataError(f"{_at(path, text, place)}: want one JSON list of records (.jsonl for a record a line)")
    place = _space(text, place + 1)
    while text[place : place + 1] != "]":
        try:
            end = decode(text, place)[1]
        except json.JSONDecodeError as error:
            raise DataError(f"{_at(path, text, error.pos)}: no valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 open brackets
            raise DataError(f"{_at(path, text, place)}: no valid JSON: {error}") from None
        yield place, end
        place = _space(text, end)
        if text[place : place + 1] == ",":
            place = _space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{_at(path, text, place)}: no valid JSON: want ',' or ']' (is the file cut short?)")
    if _space(text, place + 1) != len(text):
        raise DataError(f"{_at(path, text, place + 1)}: no valid JSON: text after the list's end")


def _open_lines(
    path: epath.Path, images: epath.Path | None, name: str, weight: float | int, keep_broken: bool
) -> JsonSource:
    data, _ = _read(path)
    good, broken, start = [], [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        end = start + len(line)
        if line.strip():
            try:
                json.loads(line.decode())
                good.append((start, end, number))
            except (ValueError, RecursionError) as error:
                shown = repr(line.decode()[:80])
                broken.append(Broken(len(good) + len(broken), number, f"no valid JSON: {error}; it begins {shown}"))
        start = end + 1
    if broken and not keep_broken:
        raise DataError(f"{path}:{broken[0].line}: {broken[0].detail}")
    table = np.asarray(good, np.int64).reshape(-1, 3)
    return JsonSource(
        name, str(path), images, weight, _hash(data), data, table[:, 0], table[:, 1], table[:, 2], tuple(broken)
    )


def _read(path: epath.Path) -> tuple[bytes, str]:
    """The file without a byte-order mark, as bytes and as text."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return data, data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte {data[error.start]:#04x} is no UTF-8 text: save it as UTF-8") from None


def _space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # always matches, if only ""


def _at(path: epath.Path, text: str, place: int) -> str:
    line = text.count("\n", 0, place) + 1
    return f"{path}:{line}:{place - (text.rfind(chr(10), 0, place) + 1) + 1}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
