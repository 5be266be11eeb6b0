"""Reads picture-caption pairs from tar shards, as img2dataset writes them: KEY.jpg beside KEY.txt or KEY.json.

A shard is never unpacked: its headers are read once, then pictures by their places in the file.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.data.sources import Record, Source
from llava_jax.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTION_WORDS = 50
_MARKS = re.compile(r"[.!\"()*#:;~]")


class Place(NamedTuple):
    """Bytes of a shard. json: they are an object with a caption, and no plain text."""

    shard: int
    start: int
    size: int
    json: int


@dataclass(frozen=True)
class ShardSource(Source):
    """shards: the tar files; keys: names of the pairs; pictures, captions: int64 [n, 4], a `Place` in each row."""

    shards: tuple[epath.Path, ...]
    keys: tuple[str, ...]
    pictures: np.ndarray
    captions: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Record:
        key = self.keys[index]
        of_picture, of_text = (Place(*map(int, table[index])) for table in (self.pictures, self.captions))
        caption = _caption(self._read(of_text), bool(of_text.json), f"{self.path}: {key}")
        raw = {
            "id": key, "image": key,
            "conversations": [{"from": "human", "value": "<image>"},
                              {"from": "gpt", "value": clean_caption(caption)}],
        }  # fmt: skip
        return Record(self.path, index, None, raw, (self._read(of_picture),))

    def _read(self, place: Place) -> bytes:
        with self.shards[place.shard].open("rb") as file:
            file.seek(place.start)
            data = file.read(place.size)
        if len(data) != place.size:
            raise DataError(f"{self.shards[place.shard]}: ends within a file: has it changed since the start?")
        return data


def clean_caption(text: str) -> str:
    """The caption as BLIP-2's and MiniGPT-4's first stage see it: lower case, without marks, 50 words at most.

        clean_caption('A "red" Boat: on the lake!') -> "a red boat on the lake"

    Source: LAVIS lavis/processors/blip_processors.py BlipCaptionProcessor @ 506965b.
    """
    text = re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:CAPTION_WORDS])


def open_shards(place: epath.Path, name: str, weight: float | int) -> ShardSource:
    """The pairs of one .tar file, or of all in a directory.

    The fingerprint covers the shards' names, and every file's name and size in them.

    Raises:
      DataError: a shard is no tar file or cut short, or a pair lacks its picture or caption; names it.
    """
    shards = tuple(sorted(place.glob("*.tar"))) if place.is_dir() else (place,)
    hashed, keys, tables = hashlib.sha256(), [], ([], [])
    for number, shard in enumerate(shards):
        pairs: dict[str, dict[str, Place]] = {}
        for key, kind, start, size in _members(shard):
            hashed.update(f"{shard.name}/{key}.{kind}:{size}\n".encode())
            found = pairs.setdefault(key, {})
            if kind in found:
                raise DataError(f"{shard}: holds {key}.{kind} twice: write it again")
            found[kind] = Place(number, start, size, kind == "json")
        for key, kinds in pairs.items():
            picture = next((kinds[kind] for kind in PICTURES if kind in kinds), None)
            caption = kinds.get("txt", kinds.get("json"))
            if picture is None or caption is None:
                wish = f"a caption ({key}.txt or .json)" if picture else f"a picture ({', '.join(PICTURES)})"
                raise DataError(f"{shard}: {key} has {', '.join(sorted(kinds))} but lacks {wish}: write it again")
            keys.append(key)
            tables[0].append(picture)
            tables[1].append(caption)
    pictures, captions = (np.asarray(table, np.int64).reshape(-1, 4) for table in tables)
    return ShardSource(name, str(place), None, weight, hashed.hexdigest(), shards, tuple(keys), pictures, captions)


def _members(shard: epath.Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, kind, start, size) of every plain file, in order; img2dataset's other files (logs) have no such kind."""
    with shard.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, _, kind = member.name.rpartition(".")
                    if not member.isfile() or kind.lower() not in (*PICTURES, "txt", "json"):
                        continue
                    if member.offset_data + member.size > end:
                        raise DataError(f"{shard}: ends within {member.name}: copy or download it again")
                    yield key, kind.lower(), member.offset_data, member.size
        except tarfile.TarError as error:
            raise DataError(f"{shard}: no whole, plain tar file ({error}): unpack or copy it again") from None


def _caption(data: bytes, is_json: bool, where: str) -> str:
    try:
        value: Any = json.loads(data)["caption"] if is_json else data.decode()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: no caption can be read ({error!r})") from None
    if not isinstance(value, str):
        raise DataError(f"{where}: caption={value!r}: want a string")
    return value
