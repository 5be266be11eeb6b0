"""JSON values that no file should hold, put in every place of a good one."""

import copy
from collections.abc import Iterator
from typing import Any

VALUES = (None, True, -7, 10**400, 1.5, float("nan"), "", "\ud800", "a\x00\x1b[31m", "../../x", [], [[]], [None], {},
          {"a": None})  # fmt: skip
TEXTS = ("[" * 100_000, '{"a": ' * 50_000, "{", "", "\x00", "\ufeff[]", "[1, 2")


def changed(value: Any) -> Iterator[Any]:
    """The value with each of VALUES in the place of each of its parts, and without each part."""
    yield from VALUES
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for part in changed(value[key]):
                whole = copy.copy(value)
                whole[key] = part
                yield whole
            whole = copy.copy(value)
            del whole[key]
            yield whole
