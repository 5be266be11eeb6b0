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
        value = json.loads(files.read(path).decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON: {error}: was its download cut short?") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: JSON of type {type(value).__name__}: want {kind.__name__}; is it the right file?")
    return value


def field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, of that type.

    Raises:
      DataError: it is not there or has another type.
    """
    if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
        found = row.get(name, "nothing") if isinstance(row, dict) else row
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {name}={str(found)[:60]!r}: want {names}")
    return row[name]
