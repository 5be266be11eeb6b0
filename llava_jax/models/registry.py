"""The parts that there are, by kind; a part of your own is added with `register`, and then works everywhere."""

import difflib
import importlib
import os
import re
import sys
from typing import Any

from llava_jax.errors import Foreign, UsageError
from llava_jax.models import clip, eva, flamingo, llama, mistral, mlp, qformer, qwen, siglip
from llava_jax.models.parts import Connector, Decoder, DecoderConfig, Tower, TowerConfig

VARIABLE = "LLAVA_JAX_PARTS"  # an environment variable: modules, with commas, that register parts when imported

_towers = {part.kind: part for part in (clip.PART, siglip.PART, eva.PART)}
_decoders = {part.kind: part for part in (llama.PART, mistral.PART, *qwen.PARTS)}
_connectors = {part.name: part for part in (*mlp.PARTS, qformer.PART, *flamingo.PARTS)}


def register(part: Tower | Decoder | Connector) -> None:
    """Adds a part, so that models may have it.

    Raises:
      UsageError: `part` is no such record, or there is one of that kind or config, or a connector whose names it
        would hide.
    """
    table = {Tower: _towers, Decoder: _decoders, Connector: _connectors}.get(type(part))
    if table is None:
        raise UsageError(f"register: {part!r}; want a Tower, a Decoder or a Connector of llava_jax.models.parts")
    word = type(part).__name__.lower()
    if isinstance(part, Connector):
        key, taken = part.name, any(re.fullmatch(name, part.name) for name in _connectors)
    else:
        key, taken = part.kind, any(other.config is part.config for other in table.values())
    if taken or key in table:
        raise UsageError(f"register: there is a {word} of the name or the config of {key!r} already; want its own")
    table[key] = part


def towers() -> dict[str, Tower]:
    """{kind: part} of all vision towers."""
    _import_parts()
    return dict(_towers)


def decoders() -> dict[str, Decoder]:
    """{kind: part} of all decoders."""
    _import_parts()
    return dict(_decoders)


def tower(kind: Any) -> Tower:
    """The vision tower of that kind. Raises UsageError where there is none."""
    return _of(towers(), kind, "vision.kind")


def decoder(kind: Any) -> Decoder:
    """The decoder of that kind. Raises UsageError where there is none."""
    return _of(decoders(), kind, "llm.kind")


def tower_of(config: TowerConfig) -> Tower:
    """The part that has such a config. Raises UsageError where there is none."""
    return _of_config(towers(), config)


def decoder_of(config: DecoderConfig) -> Decoder:
    """The part that has such a config. Raises UsageError where there is none."""
    return _of_config(decoders(), config)


def connector(projector: str) -> Connector:
    """The part of a connector's name.

    Raises:
      UsageError: no such connector.
    """
    _import_parts()
    found = [part for name, part in _connectors.items() if re.fullmatch(name, projector)]
    if not found:
        shown = ", ".join(part.shown for part in _connectors.values())
        raise UsageError(f"unknown projector {projector!r}: there are {shown}{_own()}")
    return found[0]


def _of_config(parts: dict[str, Any], config: Any) -> Any:
    for part in parts.values():
        if part.config is type(config):
            return part
    raise UsageError(f"model config: no part has a {type(config).__name__}; there are {', '.join(parts)}{_own()}")


def _of(parts: dict[str, Any], kind: Any, name: str) -> Any:
    if isinstance(kind, str) and kind in parts:
        return parts[kind]
    near = difflib.get_close_matches(str(kind), parts, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"model config {name}={kind!r}: want one of {', '.join(parts)}{hint}{_own()}")


def _own() -> str:
    return f". A part of your own: `llava_jax.register(part)` before, or {VARIABLE}=the module that does so"


def _import_parts() -> None:
    tables = (_towers, _decoders, _connectors)
    for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        if name in sys.modules:
            continue
        before = sum(map(len, tables))
        with Foreign(lambda error, name=name: _fault(name, error)):
            importlib.import_module(name)
        if sum(map(len, tables)) == before:
            raise UsageError(f"{VARIABLE} names the module {name!r}, which registers no part: want one that calls "
                             "`llava_jax.register(part)` when it is imported")  # fmt: skip


def _fault(name: str, error: BaseException) -> UsageError:
    said = next(iter(str(error).splitlines()), "")
    return UsageError(f"{VARIABLE} names the module {name!r}, which fails: {type(error).__name__}: {said}")
