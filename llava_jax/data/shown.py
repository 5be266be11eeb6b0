"""The pictures and videos of a record, wherever its form names them, in the order in which they are read."""

import base64
import binascii
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax import files
from llava_jax.data.problems import Unfit, brief
from llava_jax.prompt.conversation import IMAGE_MARKER, VIDEO_MARKER, Turn, Video

PICTURES, VIDEOS = ("image", "images"), ("video", "videos")  # keys of a record
NOTHING = (None, "", [], {}, "[]")


class Slot(NamedTuple):
    """A picture or video among a message's parts. ref: it names one; None: it is one of the record's, `index` if given.

    keys: of the record, under which it would stand.
    """

    ref: Any
    index: int | None
    keys: tuple[str, str]


def images(
    raw: Mapping[str, Any], slots: Sequence[Slot], turns: Sequence[Turn]
) -> tuple[tuple[Any, ...], bool, str]:  # fmt: skip
    """The pictures and videos in reading order, whether their markers stay where they are, and the key that names them.

    turns: in which markers stand.
    """
    image = raw.get("image")
    if raw.keys().isdisjoint(("images", *VIDEOS)) and not slots:
        if type(image) is str and image and not image.startswith("data:"):
            return (image,), False, "image"
    pictures, in_place, key = _of_kind(raw, slots, PICTURES)
    found, videos_in_place, video_key = _of_kind(raw, slots, VIDEOS)
    videos = tuple(Video(one) for one in found)
    if not videos:
        return pictures, in_place, key
    if not pictures:
        return videos, videos_in_place, video_key
    order = re.findall(f"{IMAGE_MARKER}|{VIDEO_MARKER}", "\n".join(turn.text for turn in turns))
    if (order.count(IMAGE_MARKER), order.count(VIDEO_MARKER)) != (len(pictures), len(videos)):
        raise Unfit("marker_count", f"{order.count(IMAGE_MARKER)} {IMAGE_MARKER} for {len(pictures)} image(s), "
                     f"{order.count(VIDEO_MARKER)} {VIDEO_MARKER} for {len(videos)} video(s)")  # fmt: skip
    of_kind = {IMAGE_MARKER: iter(pictures), VIDEO_MARKER: iter(videos)}
    return tuple(next(of_kind[marker]) for marker in order), True, f"{key}, {video_key}"


def _of_kind(
    raw: Mapping[str, Any], slots: Sequence[Slot], keys: tuple[str, str]
) -> tuple[tuple[Any, ...], bool, str]:  # fmt: skip
    """The pictures, or the videos, as `images` returns both."""
    slots, noun = [slot for slot in slots if slot.keys is keys], "pictures" if keys is PICTURES else "videos"
    names = [name for name in keys if raw.get(name) is not None and raw[name] != []]
    if len(names) == 2:
        raise Unfit("bad_shape", f"both {' and '.join(keys)}: keep one of them")
    key, value = (names[0], raw[names[0]]) if names else (keys[0], [])
    shown = f"{key}={brief(value)}"
    found = tuple(reference(one, shown) for one in (value if isinstance(value, list) else [value]))
    if any(slot.ref is not None for slot in slots):
        if found or any(slot.ref is None for slot in slots):
            raise Unfit("bad_shape", f"some {noun} are named in the parts of messages, others in the record: want "
                         "all of them in one place")  # fmt: skip
        return tuple(slot.ref for slot in slots), True, "content"
    order = [slot.index for slot in slots if slot.index is not None]
    if order:
        if len(order) < len(slots) or set(order) != set(range(len(found))):
            raise Unfit("marker_count", f"the parts of messages show the {noun} {order} of {len(found)} in "
                         f"{key}: want each of them, counted from 0")  # fmt: skip
        found = tuple(found[i] for i in order)
    return found, bool(slots) or (isinstance(value, list) and bool(found)), key


def reference(value: Any, shown: str) -> str | bytes:
    """A path, or the picture's bytes: {bytes, path} is the form of Hugging Face `datasets`."""
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes) or (isinstance(value, str) and value and not value.startswith("data:")):
        return value
    if not isinstance(value, str) or not value:
        raise Unfit("bad_shape", f"{shown}: want a path or a list of paths, or no such key for text alone")
    try:
        return base64.b64decode(value.partition(";base64,")[2], validate=True)
    except binascii.Error as error:
        raise Unfit("bad_image", f"{shown}: no base64 text ({error})") from None


def inside(shown: Any, root: epath.Path | None) -> Any:
    """A picture's or video's path relative to the image folder, if it is absolute and lies in it; else as it is."""
    if isinstance(shown, Video):
        return Video(inside(shown.source, root))
    return _inside(shown, root) if isinstance(shown, str) else shown


def _inside(path: str, root: epath.Path | None) -> str:
    if root is None or not (path.startswith("/") or "://" in path):
        return path
    if files.is_bucket(root) or files.is_bucket(path):
        return path.removeprefix(f"{os.fspath(root).rstrip('/')}/")
    below = _below(path, os.path.abspath(root))
    try:
        return below or _below(path, resolved(root)) or _below(os.path.realpath(path), resolved(root)) or path
    except ValueError:  # a zero byte or half a character: no path
        return path


def _below(path: str, folder: str) -> str:
    """The path within the folder; "" if it lies elsewhere."""
    folder = folder.rstrip("/") + "/"
    return path[len(folder) :].lstrip("/") if path.startswith(folder) else ""


@functools.cache
def resolved(root: epath.Path) -> str:
    """A local folder's path without links; epath's own `resolve` does not follow them."""
    return os.path.realpath(root)
