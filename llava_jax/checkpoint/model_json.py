"""What a checkpoint says about itself: `model.json` and the tokenizer's files, at the top of its directory.

    DIR/model.json                 this metadata
    DIR/tokenizer/...              the tokenizer's own files, byte for byte
    DIR/STEP/{params,state,data}   arrays (`reader` and `manager`)

Nothing is ever inferred from the name of a file or of a directory.
"""

import dataclasses
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax import files
from llava_jax.errors import UnusableCheckpoint, UsageError
from llava_jax.files import exists, is_bucket, listed, write_whole

FORMAT = 2
FAMILIES = ("llava",)
FILE = "model.json"
TOKENIZER = "tokenizer"
_JSON_TYPES: dict[str, Any] = {
    "format": int, "family": str, "model": dict, "prompt": dict, "base": list, "source": dict,
    "tokenizer": dict, "checksum": str,
    "template": str, "legacy": bool | None, "image_mode": str, "image_start_end": bool, "tiling": dict,
    "video": dict,
    "path": str, "step": int, "fingerprint": str, "patterns": list, "origin": str,
}  # fmt: skip
_SINCE = {"tokenizer": 2, "checksum": 2, "origin": 2}  # the format that brought a key; others have always been there
_OPTIONAL = ("tiling", "video")  # left out where there is none
_NOT_IN_METADATA = ("tokenizer", "checksum")


@dataclasses.dataclass(frozen=True)
class PromptMetadata:
    """How words and pictures become the model's inputs.

    legacy: None: the tokenizer's files decide.
    tiling: of image mode "anyres" (`prompt.anyres.to_json`).
    video: which frames of a video are shown (`prompt.video.to_json`); None: no video is read.
    """

    template: str
    legacy: bool | None
    image_mode: str
    image_start_end: bool
    tiling: Mapping[str, Any] | None = None
    video: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Base:
    """A checkpoint that holds parameters which this one does not.

    Attributes:
      path: its directory; absolute, or relative to the directory of the checkpoint that names it. It is tried first.
      step: its step.
      fingerprint: `reader.fingerprint(path, step)` when it was named; a base that changed is refused.
      patterns: regular expressions over parameter names; the parameters taken from it.
      origin: where it lay when it was named, absolute; tried second.
    """

    path: str
    step: int
    fingerprint: str
    patterns: tuple[str, ...]
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The content of `model.json`.

    Attributes:
      model: the model's config, as `models.presets.config_to_json` writes it.
      prompt: template, tokenizer flag and image handling the model was trained with.
      base: where the parameters come from that are not in `params`; the first base whose pattern fits wins.
      source: free provenance (what was imported, from which layout, dtypes by name); never read to decide.
      family: which architecture reads `model`.
    """

    model: Mapping[str, Any]
    prompt: PromptMetadata
    base: tuple[Base, ...] = ()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    family: str = "llava"


def absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as a path that does not depend on where the process stands: Orbax and model.json want no other."""
    path = epath.Path(directory)
    return path if is_bucket(directory) else path.resolve()


def candidates(directory: epath.PathLike, base: Base) -> list[epath.Path]:
    """Where a base of the checkpoint at `directory` may lie, the likeliest first; a link leads to where it points."""
    here = str(absolute(directory))
    homes = [here] if is_bucket(here) else [here, os.path.realpath(here)]
    near = [base.path] if is_bucket(base.path) or os.path.isabs(base.path) else [_beside(home, base) for home in homes]
    return [epath.Path(place) for place in dict.fromkeys((*near, base.origin)) if place]


def _beside(home: str, base: Base) -> str:
    """A relative path from a directory; a bucket resolves no ".."."""
    scheme, mark, inside = home.rpartition("://")
    return f"{scheme}{mark}{posixpath.normpath(posixpath.join(inside, base.path))}"


def write(directory: epath.PathLike, metadata: Metadata, tokenizer_files: Mapping[str, bytes]) -> None:
    """Writes the tokenizer's files, then `model.json`; each file appears whole or not at all.

    A base is named relative to `directory` where one path leads from one to the other, so that all can be moved.
    """
    directory = epath.Path(directory)
    for name, content in tokenizer_files.items():
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UsageError(f"tokenizer file {name!r}: a plain file name is wanted, without a folder")
        write_whole(directory / TOKENIZER / name, content)
    content = {"format": FORMAT} | dataclasses.asdict(metadata)
    content["prompt"] = {key: value for key, value in content["prompt"].items() if value is not None or
                         key not in _OPTIONAL}  # fmt: skip
    content["base"] = [dataclasses.asdict(_relative(directory, base)) for base in metadata.base]
    content["tokenizer"] = {name: _sha256(content) for name, content in tokenizer_files.items()}
    content["checksum"] = _checksum(content)
    write_whole(directory / FILE, json.dumps(content, indent=2).encode())


def read(directory: epath.PathLike) -> Metadata:
    """The metadata of the checkpoint at `directory`, compared with its checksum, as are the tokenizer's files.

    Raises:
      UnusableCheckpoint: there is none, it is damaged, has unknown or missing keys, or is of a newer version; or a file
        of the tokenizer is damaged.
      Unreachable, UsageError: as `files.retried`.
    """
    metadata, tokenizer = _read(directory)
    if tokenizer is not None:
        _check_tokenizer(epath.Path(directory) / TOKENIZER, tokenizer)
    return metadata


def bases(directory: epath.PathLike) -> tuple[Base, ...]:
    """The bases that a directory names; one without metadata (bare Orbax) names none. Raises as `read`."""
    return _read(directory)[0].base if exists(epath.Path(directory) / FILE) else ()


def read_tokenizer_files(directory: epath.PathLike) -> dict[str, bytes]:
    """{file name: content} of the tokenizer saved in a checkpoint. Raises as `read`."""
    folder = epath.Path(directory) / TOKENIZER
    tokenizer = _read(directory)[1]
    return _tokenizer_files(folder) if tokenizer is None else _check_tokenizer(folder, tokenizer)


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file of a checkpoint.

    Raises:
      FileNotFoundError: there is none.
      UnusableCheckpoint: it is no JSON.
      Unreachable, UsageError: as `files.retried`.
    """
    content = files.read(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableCheckpoint(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None


def _read(directory: epath.PathLike) -> tuple[Metadata, Mapping[str, Any] | None]:
    """(metadata, {file of the tokenizer: SHA-256}); None for the latter in format 1."""
    path = epath.Path(directory) / FILE
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableCheckpoint(missing(directory)) from None
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise UnusableCheckpoint(
            f"{path}: format {version!r}, wanted 1 to {FORMAT}; read it with the llava_jax that wrote it"
        )
    values = _fields((*_names(Metadata), "format", *_NOT_IN_METADATA), content, version, str(path))
    prompt = PromptMetadata(**_fields(_names(PromptMetadata), values["prompt"], version, f"{path}: prompt"))
    base = tuple(_read_base(entry, version, f"{path}: base[{i}]") for i, entry in enumerate(values["base"]))
    if version >= _SINCE["checksum"] and values["checksum"] != _checksum(content):
        raise UnusableCheckpoint(
            f"{path}: it differs from its checksum; copy it again (only the `path` of a base may be edited)"
        )
    if values["family"] not in FAMILIES:
        raise UnusableCheckpoint(f"{path}: family {values['family']!r}, wanted {' or '.join(FAMILIES)}")
    metadata = Metadata(values["model"], prompt, base, values["source"], values["family"])
    return metadata, values.get("tokenizer")


def missing(directory: epath.PathLike) -> str:
    """What to say where there is no model.json: how to get one depends on what is there instead."""
    directory = epath.Path(directory)
    if exists(directory / "config.json") and not exists(directory / "metrics.jsonl"):
        return (f"{directory}: no {FILE} here, so this is no llava_jax checkpoint; make one with "
                f"`python -m llava_jax.convert import {directory} DST`")  # fmt: skip
    if exists(directory):
        return (f"{directory}: no {FILE} here, so this is no llava_jax checkpoint; name a directory that `convert` or "
                "`train` wrote (a run has its model.json once it has begun to train)")  # fmt: skip
    hub = download(directory)
    hub = hub and f"{hub}, then `python -m llava_jax.convert import {directory.name} DST`"
    return (f"{directory}: there is no such checkpoint. `convert import` and `convert assemble` write them from "
            f"downloaded weights, `train --workdir` those of a stage that you train{hub}")  # fmt: skip


def download(directory: epath.PathLike) -> str:
    """"; if it is a model on Hugging Face: `hf download ...`" for what could be the name of one; else ""."""
    name = os.fspath(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or exists(name):
        return ""
    return f"; if it is a model on Hugging Face: `hf download {name} --local-dir {name.partition('/')[2]}`"


def _check_tokenizer(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, bytes]:
    content = _tokenizer_files(folder)
    for name in sorted(wanted.keys() | content.keys()):
        if name not in content:
            what = "it is missing"
        elif name not in wanted:
            what = f"{FILE} names no such file"
        else:
            what = "" if wanted[name] == _sha256(content[name]) else f"it differs from its checksum in {FILE}"
        if what:
            raise UnusableCheckpoint(f"{folder / name}: {what}; copy the checkpoint again, whole")
    return content


def _tokenizer_files(folder: epath.Path) -> dict[str, bytes]:
    entries = [path for path in listed(folder) if not path.name.startswith(".")]
    if not entries:
        raise UnusableCheckpoint(f"{folder}: missing; copy the checkpoint again, whole")
    return {path.name: files.read(path) for path in entries}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    """Of all that metadata says, but for where its bases lie: that may be edited, and they have fingerprints."""
    pinned = {name: value for name, value in content.items() if name != "checksum"}
    pinned["base"] = [
        {name: value for name, value in base.items() if name not in ("path", "origin")} for base in content["base"]
    ]
    return _sha256(json.dumps(pinned, sort_keys=True).encode())


def _relative(directory: epath.Path, base: Base) -> Base:
    if not os.path.isabs(base.path) and not is_bucket(base.path):
        return base
    (here, there), origin = (str(path).rpartition("://") for path in (absolute(directory), base.path)), base.path
    same_store = here[0] == there[0] and (not here[0] or here[2].split("/")[0] == there[2].split("/")[0])
    path = posixpath.relpath(there[2], here[2]) if same_store else base.path
    return dataclasses.replace(base, path=path, origin=origin)


def _read_base(entry: Any, version: int, where: str) -> Base:
    values = _fields(_names(Base), entry, version, where)
    try:
        patterns = tuple(re.compile(pattern).pattern for pattern in values["patterns"])
    except (re.error, TypeError, RecursionError) as error:
        raise UnusableCheckpoint(f"{where}: patterns {values['patterns']}: no regular expressions ({error})") from None
    return Base(**{**values, "patterns": patterns})


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _fields(names: tuple[str, ...], content: Any, version: int, where: str) -> dict[str, Any]:
    """`content`, when it has exactly the keys that its format knew, each of its type in JSON."""
    known = {name for name in names if _SINCE.get(name, 1) <= version}
    given = set(content) if isinstance(content, dict) else set()
    if given.union(_OPTIONAL) != known.union(_OPTIONAL) or not given <= known:
        raise UnusableCheckpoint(
            f"{where}: missing keys {sorted(known - given)}, unknown keys {sorted(given - known)}; "
            "was the file edited, or written by another version?"
        )
    for name, value in content.items():
        if not isinstance(value, _JSON_TYPES[name]) or (isinstance(value, bool) and _JSON_TYPES[name] is int):
            raise UnusableCheckpoint(f"{where}: {name} is {value!r}; wanted {_JSON_TYPES[name]}")
    return content
