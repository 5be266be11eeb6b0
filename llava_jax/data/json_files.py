"""Reads LLaVA JSON: one list of records (.json), or a record a line (.jsonl).

A file is kept as bytes and a record parsed when it is asked for: 665,298 records take the file's own size in memory,
where parsed objects take several times that.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from llava_jax import files
from llava_jax.data.files import unique_keys
from llava_jax.data.records import Record
from llava_jax.data.sources import Source
from llava_jax.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class JsonSource(Source):
    """A line that is no JSON is a record with a fault.

    data: the whole file; starts, ends: int64 [n] byte offsets of the records; lines: int64 [n] for JSON lines.
    broken: the records that did not parse.
    """

    data: bytes
    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None
    broken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        line = None if self.lines is None else int(self.lines[index])
        raw, fault = _loaded(self.data[self.starts[index] : self.ends[index]])
        return Record(self.path, index, line, raw, fault)

    @property
    def unreadable(self) -> Sequence[int]:
        return self.broken

    def written(self, index: int) -> str:
        text = self.data[self.starts[index] : self.ends[index]].decode()
        return text.replace("\r", "").replace("\n", " ")  # a line's end within JSON is white space


def open_json(path: epath.Path, images: epath.Path | None, name: str, weight: float | int) -> JsonSource:
    """The records of a .json or .jsonl file.

    Raises:
      DataError: a list that is no JSON or no UTF-8; names line and column.
    """
    data = files.read(path).removeprefix(b"\xef\xbb\xbf")
    opened = (name, str(path), images, weight, hashlib.sha256(data).hexdigest(), data)
    if path.suffix == ".json":
        bounds = _list_bounds(path, data)
        return JsonSource(*opened, bounds[:, 0], bounds[:, 1], None)
    bounds, broken = _line_bounds(data)
    return JsonSource(*opened, bounds[:, 0], bounds[:, 1], bounds[:, 2], broken)


def _loaded(content: bytes) -> tuple[Any, str]:
    """(the value, "") or (None, why it is no JSON)."""
    try:
        return json.loads(content.decode(), object_pairs_hook=unique_keys), ""
    except (ValueError, RecursionError) as error:
        return None, f"no valid JSON: {error}; it begins {content[:80].decode(errors='replace')!r}"


def _list_bounds(path: epath.Path, data: bytes) -> np.ndarray:
    """int64 [n, 2]: first byte of each element of the one list, and the one behind it."""
    text = _decoded(path, data)
    bounds = np.asarray(list(_elements(path, text)), np.int64).reshape(-1, 2)
    if text.isascii():
        return bounds
    marks = bounds.reshape(-1)  # offsets in characters become offsets in bytes, piece by piece
    pieces = zip(np.concatenate([[0], marks[:-1]]).tolist(), marks.tolist())
    return np.cumsum([len(text[a:b].encode()) for a, b in pieces], dtype=np.int64).reshape(-1, 2)


def _line_bounds(data: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
    """(int64 [n, 3]: first byte of each line, the one behind it, its number; the records that are no JSON)."""
    bounds, broken, start = [], [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            if _loaded(line)[1]:
                broken.append(len(bounds))
            bounds.append((start, start + len(line), number))
        start += len(line) + 1
    return np.asarray(bounds, np.int64).reshape(-1, 3), tuple(broken)


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


def _decoded(path: epath.Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte {data[error.start]:#04x} is no UTF-8 text: save it as UTF-8") from None


def _space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # always matches, if only ""


def _at(path: epath.Path, text: str, place: int) -> str:
    line = text.count("\n", 0, place) + 1
    return f"{path}:{line}:{place - (text.rfind(chr(10), 0, place) + 1) + 1}"
