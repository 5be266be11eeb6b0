"""Plain values and words of a command line into frozen dataclasses, and back, with errors that name the key."""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llava_jax import known_names
from llava_jax.errors import UsageError


def build(cls: Any, tree: Any, prefix: str) -> Any:
    """A frozen dataclass from a dict; `prefix` is the path so far, "train."."""
    if not isinstance(tree, dict):
        raise UsageError(f"{prefix.rstrip('.')}={tree!r}: want keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise UsageError(f"unknown key {prefix + key!r}{near_key(prefix + key, [prefix + name for name in hints])}")
    return cls(**{key: _typed(value, hints[key], prefix + key) for key, value in tree.items()})


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value as the type wants it (int -> float, list -> tuple, dict -> dataclass), or ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, vars(value) if isinstance(value, hint) else value, key + ".")
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{key}={value!r}: want {_describe_type(hint)}{near(str(value), args)}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _typed_union(value, hint, key)
    if origin is tuple and isinstance(value, tuple):
        wanted = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(wanted) == len(value):
            return tuple(_typed(v, h, f"{key}.{i}") for i, (v, h) in enumerate(zip(value, wanted)))
    elif hint is float and type(value) is int and abs(value) < sys.float_info.max:
        return float(value)
    elif type(value) is hint:
        return value
    raise UsageError(f"{key}={value!r}: want {_describe_type(hint)}")


def _typed_union(value: Any, hint: Any, key: str) -> Any:
    for option in typing.get_args(hint):
        try:
            return _typed(value, option, key)
        except ValueError:
            continue
    raise UsageError(f"{key}={value!r}: want {_describe_type(hint)}")


def _describe_type(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Union and typing.get_origin(typing.get_args(hint)[0]) is Literal:
        return _describe_type(typing.get_args(hint)[0])  # the others are tuples of it, which no command line gives
    return hint.__name__ if isinstance(hint, type) else str(hint)


def near(word: str, known: Sequence[str]) -> str:
    """"; did you mean 'nearest'?", or "" where none of `known` is near."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def near_key(key: str, known: Sequence[str]) -> str:
    """A remedy for an unknown key: the one with the same last part, what others call so, or the nearest."""
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return near(same[0], same) if same else known_names.hint(key) or near(key, known)


def parse(text: str, hint: Any, key: str) -> Any:
    """A command-line text as a scalar of the type that the key has."""
    words = {"true": True, "false": False, "none": None}
    for read in (words.__getitem__, int, float):
        try:
            return _typed(read(text.lower()), hint, key)
        except (KeyError, ValueError):
            continue
    if typing.get_origin(hint) is tuple:
        raise UsageError(f"{key}={text!r}: want {_describe_type(hint)}: a tuple is set in the file")
    return _typed(text, hint, key)


def replaced(item: Any, name: str, text: str, key: str) -> Any:
    """A dataclass with one of its scalars read from a command line's text."""
    hints = typing.get_type_hints(type(item))
    if name not in hints:
        prefix = key.removesuffix(name)
        raise UsageError(f"unknown key {key!r}: want one of {', '.join(prefix + one for one in hints)}")
    return dataclasses.replace(item, **{name: parse(text, hints[name], key)})


def replaced_in(items: Sequence[Any], place: str, text: str, blank: Any, key: str) -> tuple[Any, ...]:
    """Dataclasses, one of them with a scalar replaced: place "0.path". The number after the last adds a blank one."""
    index, _, name = place.partition(".")
    known = [str(i) for i in range(len(items) + 1)]
    if index not in known:
        raise UsageError(f"unknown key {f'{key}.{place}'!r}: want {key}.{', '.join(known)} and a name of its own")
    filled = [*items, *[blank] * (int(index) == len(items))]
    filled[int(index)] = replaced(filled[int(index)], name, text, f"{key}.{place}")
    return tuple(filled)


def describe(config: Any) -> dict[str, Any]:
    """{"train.lr": 1e-3, "data.sources.0.path": ..., "rates": [[pattern, rate], ...]}: flat, of JSON values."""
    return {name: leaf for key, value in vars(config).items() for name, leaf in _flat(value, key).items()}


def _flat(value: Any, key: str) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        children = vars(value).items()
    elif isinstance(value, tuple) and any(dataclasses.is_dataclass(child) for child in value):
        children = enumerate(value)
    else:
        return {key: _listed(value)}
    return {name: leaf for place, child in children for name, leaf in _flat(child, f"{key}.{place}").items()}


def _listed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _listed(tuple(vars(value).values()))
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value differs between two `describe`s: "train.lr: 0.001 -> 0.002"."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = (repr(one[key]) if key in one else "(no such key)" for one in (old, new))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines
