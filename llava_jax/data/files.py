"""JSON files of others, and fields that must be in them: an error names the file, the row and what was wanted."""

import json
from typing import Any

from etils import epath

from llava_jax import files
from llava_jax.errors import DataError


def read_json(path: epath.Path, kind: type = object) -> Any:
    """The value in a JSON file, of that type.

    Raises:
      DataError: it is no JSON, for instance because a download was cut short, or has another type.
    """
    try:
        value = json.loads(files.read(path).decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON: {error}: was its download cut short?") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: JSON of type {type(value).__name__}: want {kind.__name__}; is it the right file?")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`.

    Raises:
      ValueError: a key stands twice; json takes the last and says nothing.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return value


def read_text(path: epath.Path) -> str:
    """The text of a file.

    Raises:
      DataError: it is no UTF-8.
    """
    try:
        return files.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no UTF-8 text: is it the right file?") from None


def texts(row: Any, name: str, where: str) -> list[str]:
    """`row[name]`, a list of texts.

    Raises:
      DataError: it is not there or holds something else.
    """
    values = field(row, name, list, where)
    return [field({f"{name}[{place}]": value}, f"{name}[{place}]", str, where) for place, value in enumerate(values)]


def field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, of that type.

    Raises:
      DataError: it is not there or has another type.
    """
    names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
    if not isinstance(row, dict):
        raise DataError(f"{where}: {str(row)[:60]!r}: want an object with {name}, {names}")
    if name not in row:
        raise DataError(f"{where}: {name} is missing: want {names}")
    if not isinstance(row[name], kind):
        raise DataError(f"{where}: {name}={str(row[name])[:60]!r}: want {names}")
    return row[name]
