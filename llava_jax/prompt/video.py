"""Videos: which frames of a file or a folder are shown, and which features stand for them.

PyAV (extra `video`) reads files, and is imported when the first one is opened; a folder of frames needs it not. How
many frames a video has follows from its container, so rows can be planned without decoding it.
"""

import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from llava_jax import files, streams
from llava_jax.batch import NEWLINE, Corners, Layout, alone
from llava_jax.errors import MissingFile, MissingPackage, UsageError
from llava_jax.prompt import anyres
from llava_jax.prompt.conversation import Length, Video
from llava_jax.prompt.images import MAX_PIXELS, SUFFIXES, Image, local_bytes, open_image, spellings

POOL = 2  # features a side that become one. Source: LLaVA-NeXT llava_arch.py get_2dPool
# FFmpeg's readers of these containers open no other file; those of playlists and of numbered pictures do.
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf"


@dataclass(frozen=True)
class FrameRule:
    """Which frames of a video are shown.

    frames: at most so many, uniformly chosen where there are more.
    fps: so many a second, rounded to every n-th frame; 0: all.
    time_stamps: the prompt says when each of them is, see `time_stamps`.
    """

    frames: int
    fps: float = 0.0
    time_stamps: bool = False


RELEASED = FrameRule(32)  # OneVision's frames_upbound, and of its released answers


def rule(frames: Any, fps: Any, time_stamps: Any = False) -> FrameRule | None:
    """The rule that a config describes; None where videos are not read.

    Raises:
      UsageError: frames or fps that are none, or fps or time stamps without frames.
    """
    if type(frames) is not int or not 0 <= frames <= 4096:
        raise UsageError(f"prompt.frames={frames!r}: want the most frames of a video, up to 4096; 0: no video is read")
    if type(fps) not in (int, float) or not 0 <= fps <= 1000:
        raise UsageError(f"prompt.fps={fps!r}: want frames a second, up to 1000; 0: prompt.frames of any video")
    if fps and not frames:
        raise UsageError(f"prompt.fps={fps} with prompt.frames=0: want the most frames of a video, such as 32")
    if type(time_stamps) is not bool or time_stamps > frames:
        raise UsageError(f"prompt.time_stamps={time_stamps!r} with prompt.frames={frames}: want True or False, and "
                         "True with the most frames of a video, such as 64")  # fmt: skip
    return FrameRule(frames, float(fps), time_stamps) if frames else None


def from_json(content: Mapping[str, Any] | None) -> FrameRule | None:
    """The rule of a model.json, as `to_json` wrote it. Raises UsageError where it is none."""
    content = {"frames": 0, "fps": 0.0} if content is None else content
    if content.keys() - {"time_stamps"} != {"frames", "fps"}:
        raise UsageError(f"video of keys {sorted(content)}: want frames, fps and, where the prompt says them, "
                         "time_stamps")  # fmt: skip
    return rule(content["frames"], content["fps"], content.get("time_stamps", False))


def to_json(rule: FrameRule | None) -> dict[str, Any] | None:
    """What a model.json says of a rule, of time stamps where there are any; None where videos are not read."""
    if rule is None:
        return None
    return {"frames": rule.frames, "fps": rule.fps} | ({"time_stamps": True} if rule.time_stamps else {})


def check(rule: FrameRule | None, features: int, in_row: bool) -> None:
    """Raises UsageError where a model cannot read videos.

    features: N, of a frame. in_row: they stand in the row of tokens.
    """
    if rule is not None and not (in_row and math.isqrt(features) ** 2 == features):
        raise UsageError(f"prompt.frames={rule.frames}: the {features} features of a frame are no square in the row, "
                         'which pooling wants: select_feature="patch" and a connector that keeps it; or prompt.frames='
                         "0")  # fmt: skip


def layout(frames: int, features: int, newline: bool) -> Layout:
    """The features that stand for so many frames: each pooled to half the side, rounded up, then one newline.

        2 frames of 4 x 4 features, pooled to 2 x 2: each of the 4 is the mean of the features between the lines
        (0 1 4 5) (2 3 6 7) (8 9 12 13) (10 11 14 15) (16 17 20 21) (18 19 22 23) (24 25 28 29) (26 27 30 31) newline

    Source: transformers modeling_llava_onevision.py (`apply_pooling`, `get_video_features`), LLaVA-NeXT llava_arch.py
    (`mm_newline_position` "one_token", `mm_spatial_pool_mode` "bilinear").

    Args:
      features: N, of a frame after the connector; a square number.
    """
    side = math.isqrt(features)
    half = -(-side // POOL)
    one = anyres.bilinear(np.arange(features, dtype=np.int32).reshape(side, side), half, half)
    starts = features * np.arange(frames, dtype=np.int32)[:, None, None]
    slots = (starts + one.slots.reshape(-1, 4)).reshape(-1, 4)
    mixed = Corners(slots, np.tile(one.weights.reshape(-1, 4), (frames, 1)))
    ends = alone(np.full(int(newline), NEWLINE, np.int32))
    corners = Corners(*(np.concatenate(pair) for pair in zip(mixed, ends)))
    return Layout(frames, features, corners.slots[:, 0], corners)


def indices(total: int, rate: float | None, rule: FrameRule) -> list[int]:
    """Which of `total` frames are shown. rate: frames a second; None: nothing says it, as of a folder.

    Source: LLaVA-NeXT llava/utils.py process_video_with_pyav. Differs from LLaVA-NeXT: a video of fewer frames than
    `frames` shows each once, where released answers repeat some of them.
    """
    every = range(0, total, step(rate, rule))
    return list(every) if len(every) <= rule.frames else np.linspace(0, total - 1, rule.frames, dtype=int).tolist()


def step(rate: float | None, rule: FrameRule) -> int:
    """Every how many frames one is shown, of a video with few enough. rate: as of `indices`."""
    return max(1, round(rate / rule.fps)) if rule.fps and rate else 1


def measure(video: Video, root: epath.PathLike | None = None) -> Length:
    """How long a video is; nothing is decoded. Arguments and errors as of `frames`."""
    if video.length:
        return video.length
    pictures = _pictures(video.source, root)
    return _measured(video.source, root) if pictures is None else Length(len(pictures))


def count(video: Video, rule: FrameRule, root: epath.PathLike | None = None) -> int:
    """How many pictures `frames` returns; nothing is decoded. Arguments and errors as there."""
    length = measure(video, root)
    return len(indices(length.frames, length.rate, rule))


def frames(video: Video, rule: FrameRule, root: epath.PathLike | None = None) -> Iterator[Image.Image]:
    """The frames that are shown, as RGB, one in memory at a time. As of pictures, a rotation that the file asks for is
    not applied.

    root: the folder that paths are relative to and may not leave.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: no video, damaged, without a frame, or outside of `root`; names it.
      MissingPackage: it is a file, and PyAV is not installed.
    """
    pictures = _pictures(video.source, root)
    if pictures is not None:
        places = range(len(pictures)) if video.length else indices(len(pictures), None, rule)
        yield from (open_image(pictures[i], root) for i in places)
        return
    length = _measured(video.source, root)
    yield from _decoded(video.source, root, indices(length.frames, length.rate, rule), length.frames)


def opened(video: Video, rule: FrameRule, root: epath.PathLike | None = None) -> Video:
    """The frames that are shown, decoded, with what is known of the whole. Raises as `frames`."""
    return Video(tuple(frames(video, rule, root)), measure(video, root))


def _pictures(source: Any, root: epath.PathLike | None) -> list[Any] | None:
    """The frames of a folder, or of a list, as references to pictures; None: it is a file."""
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        references, name = list(source), "video given as pictures"
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        folder = next((path for path in spellings(name, root, "video") if files.is_dir(path)), None)
        if folder is None:
            return None
        names = (entry.name for entry in files.listed(folder) if entry.suffix.lower() in SUFFIXES)
        references, name = [f"{name}/{one}" for one in sorted(names, key=_natural)], f"video {name!r}"
    else:
        return None
    if not references:
        raise UsageError(f"{name}: no frames in it; want pictures ({', '.join(SUFFIXES)}) in the order of their names")
    return references


def _natural(name: str) -> list[str | int]:
    """frame_2 before frame_10."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)  # every second one is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _measured(source: Any, root: epath.PathLike | None) -> Length:
    """How many frames a file gives, how many a second, and how large they are.

    By the container's index where it has a whole one; else all packets are looked at. FFmpeg's `nb_frames` counts those
    too that an edit list hides, as in clips that were cut without encoding them anew.
    """
    with _opened(source, root) as (name, container, stream):
        entries = stream.index_entries
        if stream.frames and len(entries) == stream.frames:
            total = sum(not entry.is_discard for entry in entries)
        else:
            total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        if not total:
            raise UsageError(f"{name}: no frames in it; replace the file or drop the record")
        rate = float(stream.average_rate) if stream.average_rate else None
        return Length(total, rate, stream.width * stream.height)


def _decoded(source: Any, root: epath.PathLike | None, chosen: list[int], total: int) -> Iterator[Image.Image]:
    left, seen = set(chosen), 0
    with _opened(source, root) as (name, container, stream):
        for seen, frame in enumerate(container.decode(stream), 1):
            if seen - 1 in left:
                yield open_image(frame.to_image())
                left.remove(seen - 1)
            if not left:
                return
    raise UsageError(f"{name}: {seen} of its {total} frames can be decoded; encode it anew or drop the record")


@contextmanager
def _opened(source: Any, root: epath.PathLike | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, PyAV's container, its video stream) of a file."""
    try:
        import av
    except ImportError:
        raise MissingPackage("video files want PyAV, which is missing: `pip install av` (the extra `video`); or give "
                             "each video as a folder of frames") from None  # fmt: skip
    name, file = _file(source, root)
    # PyAV 19 reads titles that are no UTF-8 by itself; to 18, the newest of Python 3.11, they were an error.
    titles = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "replace"}
    with file:
        try:
            with av.open(file, options={"format_whitelist": CONTAINERS}, **titles) as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise UsageError(f"{name}: no frames in it, only sound; replace the file or drop the record")
                if stream.width * stream.height > MAX_PIXELS:
                    raise UsageError(f"{name}: {stream.width} x {stream.height} pixels, want {MAX_PIXELS} in all at "
                                     "most: resize it")  # fmt: skip
                yield name, container, stream
        except av.FFmpegError as error:
            raise UsageError(f"{name}: no video, or a damaged one ({error.strerror}): replace the file or drop the "
                             f"record; want one of {CONTAINERS}, or a folder of frames") from error  # fmt: skip


def _file(source: Any, root: epath.PathLike | None) -> tuple[str, io.BufferedIOBase]:
    """A name for messages, and the open file."""
    if isinstance(source, bytes):
        return f"video given as {len(source)} bytes", io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"video given as {type(source).__name__}: want a path, a file's bytes or a list of pictures")
    for path in spellings(os.fspath(source), root, "video"):
        try:
            if not files.is_bucket(path):
                local_bytes(path, root, "video")
            return f"video {path!r}", streams.open_read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise MissingFile(f"video {path!r}: no such file or folder")
