"""Reads JSON lists and lines of this package; writes whole files, so that a kill leaves the old or the new one."""

import collections
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from etils import epath

from llava_jax.errors import DataError, MissingFile
from llava_jax.files import read, write_whole


def read_json(path: epath.PathLike) -> Any:
    """The value of a JSON file.

    Raises:
      FileNotFoundError: there is none. DataError: it is no JSON; names the line.
    """
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON: {error}") from None


def read_rows(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every object in a `.json` list or a `.jsonl` file; where is for messages.

    Raises:
      FileNotFoundError: there is no file. DataError: no JSON, no list, or a row that is no object; names the row.
    """
    if str(path).endswith(".jsonl"):
        rows = _lines(path)
    else:
        value = read_json(path)
        if not isinstance(value, list):
            raise DataError(f"{path}: holds a {type(value).__name__}: want a list of objects, or a .jsonl file")
        rows = ((f"{path}[{index}]", row) for index, row in enumerate(value))
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: {brief(row)}: want an object")
        yield where, row


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one. In JSON, half a character (a lone surrogate) becomes its escape."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, a list with one element a line."""
    if isinstance(value, list) and value:
        body = ",\n".join(json.dumps(element, ensure_ascii=False) for element in value)
        write_text(path, f"[\n{body}\n]\n")
    else:
        write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes objects as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def field(row: dict[str, Any], where: str, name: str, kind: type | UnionType, expected: str) -> Any:
    """A field that must be there and of this type.

    Raises:
      DataError: it is not; names the expected value.
    """
    if name not in row:
        raise DataError(f"{where}: no field {name!r}: want {expected}; it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise DataError(f"{where}: {name}={brief(row[name])}: want {expected}")
    return row[name]


def image_path(row: dict[str, Any], where: str, name: str = "image") -> str:
    """A picture's path, which stays inside the image folder.

    Raises:
      DataError: it is missing, empty or leads elsewhere.
    """
    path = field(row, where, name, str, "a path relative to the image folder")
    outside = path.startswith(("/", "\\")) or "://" in path or ".." in path.replace("\\", "/").split("/")
    if not path or outside or not encodable(path):
        raise DataError(f"{where}: {name}={brief(path)}: want a path relative to the image folder")
    return path


def encodable(text: str) -> bool:
    """Whether a text can be sent and written: JSON may hold half a character, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def count(names: Iterable[str]) -> dict[str, int]:
    """{name: how often}, the most frequent first."""
    return dict(collections.Counter(names).most_common())


def brief(value: Any) -> str:
    """At most 80 characters of a value, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(path: epath.PathLike) -> str:
    try:
        return read(path).removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no UTF-8 text: save it as UTF-8") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise MissingFile(f"{path}: {error.strerror}: want a .json or .jsonl file that can be read") from None


def _lines(path: epath.PathLike) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: no valid JSON: {error} (is the line cut short?)") from None
        yield f"{path}:{number}", row
