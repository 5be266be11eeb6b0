"""Reads pairs of a picture or video and its caption from tar shards, as img2dataset and video2dataset write them:
KEY.jpg or KEY.mp4 beside KEY.txt or KEY.json.

A shard is never unpacked: its headers and captions are read once, then a picture by its place in the file.
"""

import hashlib
import json
import logging
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax import files, streams
from llava_jax.data.files import unique_keys
from llava_jax.data.records import Record
from llava_jax.data.sources import Source
from llava_jax.errors import DataError, Unreachable

PICTURES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "webm", "avi", "mov", "mkv")
CAPTIONS = ("txt", "json")  # the first that is there counts
CAPTION_WORDS = 50
_MARKS = re.compile(r"[.!\"()*#:;~]")
_OURS = {*PICTURES, *VIDEOS, *CAPTIONS}
_MOST_CAPTION_BYTES = 10**6  # img2dataset's .json holds a page of metadata beside the caption
_READERS = 8  # shards that are opened at once; more than one only helps where a store is far
# A bucket's shard is read through: a request for each header would take a thousand times as long.
_BLOCK_BYTES = 16 * 2**20

_log = logging.getLogger(__name__)


class _Member(NamedTuple):
    """A file in a shard. content: of a caption; fault: why it cannot be used, or ""."""

    key: str
    kind: str
    start: int
    size: int
    content: bytes
    fault: str


class _Pair(NamedTuple):
    """A picture's or video's place in its shard and its caption; or what is wrong with them.

    shown: "image" or "video".
    """

    key: str
    shown: str
    start: int
    size: int
    caption: str
    fault: str


@dataclass(frozen=True)
class ShardSource(Source):
    """Pairs of tar files. A pair that is damaged is a record with a fault.

    Attributes:
      shards: the tar files.
      pairs: of all shards.
      shard_of: int32 [n], the shard of each pair.
    """

    shards: tuple[epath.Path, ...]
    pairs: tuple[_Pair, ...]
    shard_of: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        pair, shard = self.pairs[index], self.shards[self.shard_of[index]]
        if pair.fault:
            return self._record(index, b"", pair.fault)
        try:
            content = files.read_range(shard, pair.start, pair.size)
        except Unreachable:
            raise
        except OSError as error:
            return self._record(index, b"", f"{shard}: cannot be read ({error})")
        noun = pair.shown.replace("image", "picture")
        fault = "" if len(content) == pair.size else f"{shard}: ends within its {noun}: has it changed?"
        return self._record(index, content, fault)

    def text(self, index: int) -> Record:
        return self._record(index, b"", self.pairs[index].fault)

    @property
    def unreadable(self) -> Sequence[int]:
        return [index for index, pair in enumerate(self.pairs) if pair.fault]

    def _record(self, index: int, content: bytes, fault: str) -> Record:
        pair = self.pairs[index]
        turns = [{"from": "human", "value": f"<{pair.shown}>"}, {"from": "gpt", "value": clean_caption(pair.caption)}]
        return Record(self.path, index, None, {"id": pair.key, pair.shown: content, "conversations": turns}, fault)


def clean_caption(text: str) -> str:
    """The caption as BLIP-2's and MiniGPT-4's first stage see it: lower case, without marks, 50 words at most.

        clean_caption('A "red" Boat: on the lake!') -> "a red boat on the lake"

    Source: LAVIS lavis/processors/blip_processors.py BlipCaptionProcessor @ 506965b.
    """
    text = re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:CAPTION_WORDS])


def open_shards(place: epath.Path, shards: tuple[epath.Path, ...], name: str, weight: float | int) -> ShardSource:
    """The pairs of some .tar files, of which `place` is the only one, or the directory of all.

    The fingerprint covers the shards' names, and every file's name and size in them.

    Raises:
      DataError: a shard is no tar file, or it ends before its end mark; names it.
    """
    hashed, pairs, shard_of = hashlib.sha256(), [], []
    start = last = time.monotonic()
    with ThreadPoolExecutor(_READERS) as pool:
        for number, (listing, found) in enumerate(pool.map(_read_shard, shards)):
            hashed.update(listing)
            pairs += found
            shard_of += [number] * len(found)
            if (now := time.monotonic()) - last > 10:
                last, rate = now, (number + 1) / (now - start)
                _log.info("reads the headers of %s: %d of %d shards, %.1f/s, ETA %.0f s", name, number + 1, len(shards),
                          rate, (len(shards) - number - 1) / rate)  # fmt: skip
    table = np.asarray(shard_of, np.int32)
    return ShardSource(name, str(place), None, weight, hashed.hexdigest(), shards, tuple(pairs), table)


def _read_shard(shard: epath.Path) -> tuple[bytes, list[_Pair]]:
    """(names and sizes of the files in it, its pairs)."""
    listing, members = [], dict[str, dict[str, _Member]]()
    twice = dict[str, str]()
    for member in _members(shard):
        known = members.setdefault(member.key, {})
        if member.kind in known:
            twice[member.key] = f"{member.key}.{member.kind} is there twice"
        known[member.kind] = member
        if member.kind in _OURS:
            listing.append(f"{shard.name}/{member.key}.{member.kind}:{member.size}\n")
    # Files with none of the suffixes are none of ours: img2dataset's logs.
    ours = {key: kinds for key, kinds in members.items() if not _OURS.isdisjoint(kinds)}
    return "".join(listing).encode(), [_pair(key, kinds, twice.get(key, "")) for key, kinds in ours.items()]


def _pair(key: str, kinds: dict[str, _Member], fault: str) -> _Pair:
    picture, clip, caption = (next((kinds[kind] for kind in suffixes if kind in kinds), None)
                              for suffixes in (PICTURES, VIDEOS, CAPTIONS))  # fmt: skip
    shown, there = picture or clip, f"the shard has {key}.{', .'.join(sorted(kinds))}"
    if picture and clip:
        fault = fault or f"{there}: want a picture or a video for a caption: drop one of the files"
    if shown is None or caption is None:
        lacking = (f"a caption ({key}.txt or .json)" if shown else
                   f"a picture ({', '.join(PICTURES)}) or video ({', '.join(VIDEOS)})")  # fmt: skip
        return _Pair(key, "image", 0, 0, "", fault or f"{there} but lacks {lacking}")
    fault = fault or caption.fault
    try:
        text = "" if fault else _caption(caption)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text, fault = "", f"no caption can be read in {key}.{caption.kind} ({error!r})"
    return _Pair(key, "image" if picture else "video", shown.start, shown.size, text, fault)


def _members(shard: epath.Path) -> Iterator[_Member]:
    """Every plain file, in order.

    Raises:
      DataError: no tar file, or one that is cut off or damaged between its files: nobody knows what is lost.
    """
    try:
        with streams.open_read(shard, _BLOCK_BYTES) as file:
            end = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    if member.offset_data + member.size > end:
                        raise DataError(f"{shard}: ends within {member.name}: copy or download it again")
                    yield _member(tar, member)
                offset = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{shard}: no whole, plain tar file ({error}): unpack or copy it again") from None
    # Python's reader takes both for the end of the archive.
    mark = files.read_range(shard, offset, tarfile.BLOCKSIZE)
    if not mark or any(mark):
        what = "a damaged header" if mark else "no end mark"
        raise DataError(f"{shard}: {what} at byte {offset}, so files may be lost: copy or download it again")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> _Member:
    key, _, kind = member.name.rpartition(".")
    kind, content, fault = kind.lower(), b"", ""
    if kind in CAPTIONS and member.size > _MOST_CAPTION_BYTES:
        fault = f"{member.name} has {member.size} bytes, a caption at most {_MOST_CAPTION_BYTES}"
    elif kind in CAPTIONS:
        content = tar.extractfile(member).read()
    return _Member(key, kind, member.offset_data, member.size, content, fault)


def _caption(member: _Member) -> str:
    if member.kind != "json":
        return member.content.decode()
    value: Any = json.loads(member.content, object_pairs_hook=unique_keys)["caption"]
    if not isinstance(value, str):
        raise TypeError(f"caption={str(value)[:60]!r}: want a string")
    return value
