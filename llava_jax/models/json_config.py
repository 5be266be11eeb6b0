"""Dataclasses out of JSON objects, with errors that name the key: the `model` part of model.json."""

from dataclasses import MISSING, fields
from types import GenericAlias
from typing import Any, get_args

from llava_jax.errors import UsageError

_SCALARS = (int, float, bool, str)


def branch(values: Any, where: str) -> dict[str, Any]:
    """A copy of a JSON object. Raises UsageError where it is none."""
    _check(isinstance(values, dict), where, values, "an object with its sizes")
    return dict(values)


def build(kind: type, values: Any, where: str) -> Any:
    """A dataclass of JSON values: a key that an older version did not write has its default.

    Raises:
      UsageError: a missing or an unknown key, or a value of another type; `where` names it.
    """
    values = branch(values, where)
    known = [field.name for field in fields(kind)]
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    wrong = sorted((set(values) - set(known)) | (needed - set(values)))
    if wrong:
        raise UsageError(f"{where} in model.json: keys {wrong} are missing or unknown; there are {known}")
    typed = {field.name: _typed(f"{where}.{field.name}", values[field.name], field.type)
             for field in fields(kind) if field.name in values}  # fmt: skip
    return kind(**typed)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value out of JSON, where it is of a field's type."""
    if kind is float and type(value) is int:
        return float(value)
    kinds = get_args(kind)
    if isinstance(value, tuple) and isinstance(kind, GenericAlias):
        _check(len(value) == len(kinds), name, value, f"{len(kinds)} numbers")
        return tuple(_typed(name, one, part) for one, part in zip(value, kinds))
    fits = any(type(value) is one or (one not in _SCALARS and isinstance(value, one)) for one in kinds or (kind,))
    _check(fits and value == value, name, value, f"a value of type {kind.__name__ if kind in _SCALARS else kind}")
    return value


def _check(fine: bool, name: str, value: object, wish: str) -> None:
    if not fine:
        raise UsageError(f"model config {name}={value!r}: want {wish}")
