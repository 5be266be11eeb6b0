"""What a checkpoint says about itself: `model.json` and the tokenizer's files, at the top of its directory.

    DIR/model.json                 this card
    DIR/tokenizer/...              the tokenizer's own files, byte for byte
    DIR/STEP/{params,state,data}   arrays (`store` and `manager`)

Nothing is ever inferred from the name of a file or of a directory.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax.errors import UnusableCheckpoint, UsageError

FORMAT = 1
FILE = "model.json"
TOKENIZER = "tokenizer"
_JSON_TYPES: dict[str, Any] = {
    "format": int, "family": str, "model": dict, "prompt": dict, "base": list, "source": dict,
    "template": str, "legacy": bool | None, "image_mode": str, "image_start_end": bool,
    "path": str, "step": int, "fingerprint": str, "patterns": list,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PromptCard:
    """How words and pictures become the model's inputs. `legacy` None: the tokenizer's files decide."""

    template: str
    legacy: bool | None
    image_mode: str
    image_start_end: bool


@dataclasses.dataclass(frozen=True)
class Base:
    """A checkpoint that holds leaves which this one does not.

    Attributes:
      path: its directory; absolute, or relative to the directory of the checkpoint that names it.
      step: its step.
      fingerprint: `store.fingerprint(path, step)` when it was named; a base that changed is refused.
      patterns: regular expressions over parameter names; the leaves taken from it.
    """

    path: str
    step: int
    fingerprint: str
    patterns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Card:
    """The content of `model.json`.

    Attributes:
      model: the model's config, as `models.presets.config_to_json` writes it.
      prompt: template, tokenizer flag and image handling the model was trained with.
      base: where the leaves come from that are not in `params`; the first base whose pattern fits wins.
      source: free provenance (what was imported, from which layout, dtypes by name); never read to decide.
      family: which architecture reads `model`.
      format: version of this file.
    """

    model: Mapping[str, Any]
    prompt: PromptCard
    base: tuple[Base, ...] = ()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    family: str = "llava"
    format: int = FORMAT


def absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as a path that does not depend on where the process stands: Orbax and cards want no other."""
    path = epath.Path(directory)
    return path if "://" in str(directory) else path.resolve()


def write_card(directory: epath.PathLike, card: Card, tokenizer_files: Mapping[str, bytes]) -> None:
    """Writes the tokenizer's files, then `model.json`; each file appears whole or not at all.

    A base that lies inside `directory` is named relative to it, so that the whole can be moved and copied.
    """
    directory = epath.Path(directory)
    inside = f"{absolute(directory)}/"
    card = dataclasses.replace(
        card, base=tuple(dataclasses.replace(base, path=base.path.removeprefix(inside)) for base in card.base)
    )
    (directory / TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files.items():
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UsageError(f"tokenizer file {name!r}: a plain file name is wanted, without a folder")
        write_whole(directory / TOKENIZER / name, content)
    write_whole(directory / FILE, json.dumps(dataclasses.asdict(card), indent=2).encode())


def read_card(directory: epath.PathLike) -> Card:
    """The card of the checkpoint at `directory`.

    Raises:
      UnusableCheckpoint: there is none, it is broken, has unknown or missing keys, or is of another version.
    """
    path = epath.Path(directory) / FILE
    if not path.exists():
        raise UnusableCheckpoint(
            f"{directory}: no {FILE} here, so this is no llava_jax checkpoint; "
            f"make one with `python -m llava_jax.convert import {directory} DST`"
        )
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnusableCheckpoint(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UnusableCheckpoint(
            f"{path}: format {version!r}, wanted {FORMAT}; read it with the llava_jax that wrote it"
        )
    values = _fields(Card, content, str(path))
    prompt = PromptCard(**_fields(PromptCard, content["prompt"], f"{path}: prompt"))
    base = tuple(_read_base(entry, f"{path}: base[{i}]") for i, entry in enumerate(content["base"]))
    return Card(**{**values, "prompt": prompt, "base": base})


def read_tokenizer_files(directory: epath.PathLike) -> dict[str, bytes]:
    """{file name: content} of the tokenizer saved in a checkpoint."""
    folder = epath.Path(directory) / TOKENIZER
    if not folder.is_dir():
        raise UnusableCheckpoint(f"{folder}: missing; copy the checkpoint again, whole")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part."""
    partial = path.parent / f".{path.name}.partial"
    partial.write_bytes(content)
    partial.replace(path)


def _read_base(entry: Any, where: str) -> Base:
    values = _fields(Base, entry, where)
    try:
        patterns = tuple(re.compile(pattern).pattern for pattern in values["patterns"])
    except (re.error, TypeError) as error:
        raise UnusableCheckpoint(f"{where}: patterns {values['patterns']}: no regular expressions ({error})") from None
    return Base(**{**values, "patterns": patterns})


def _fields(kind: type, content: Any, where: str) -> dict[str, Any]:
    """`content`, when it has exactly the fields of `kind`, each of its type in JSON."""
    wanted = {field.name for field in dataclasses.fields(kind)}
    found = set(content) if isinstance(content, dict) else set()
    if found != wanted:
        raise UnusableCheckpoint(
            f"{where}: missing keys {sorted(wanted - found)}, unknown keys {sorted(found - wanted)}; "
            "was the file edited, or written by another version?"
        )
    for name, value in content.items():
        if not isinstance(value, _JSON_TYPES[name]):
            raise UnusableCheckpoint(f"{where}: {name} is {value!r}; wanted {_JSON_TYPES[name]}")
    return content
