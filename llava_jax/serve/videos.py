"""Videos of a message: parts of type `video_url` as vLLM's clients send them, and how much of them a server decodes."""

import base64
import binascii
import re
from typing import Any

from llava_jax.errors import MissingPackage
from llava_jax.prompt import video
from llava_jax.prompt.conversation import Video
from llava_jax.prompt.encode import Format
from llava_jax.serve.fields import Refused, refuse

MAX_FRAME_PIXELS, MAX_ALL_PIXELS = 16_000_000, 4_000_000_000  # of a frame, and of all frames of a request's videos
DECODE_SECS = 30.0  # that a video may take; a minute of 1920 x 1080 takes 10 on a core
# A recording's type has parameters: data:video/webm;codecs=vp9,opus;base64,...
_DATA_URL = re.compile(r"data:video/([a-z0-9.+-]{1,40})(?:;[a-z0-9]{1,20}=[^;]{1,80})?;base64,", re.ASCII | re.I)
_FRAMES = "jpeg"  # of vLLM: frames as JPEG files, each in base64, between commas


def read(value: Any, name: str) -> Video:
    """The video of a part's `video_url`, not opened yet.

    name: of the field.

    Raises:
      Refused: it is no data: URL of a video.
    """
    url = value.get("url") if type(value) is dict else None
    if type(url) is not str:
        refuse(name, value, 'an object such as {"url": "data:video/mp4;base64,..."}')
    match = _DATA_URL.match(url)
    if match is None:
        refuse(f"{name}.url", url, "a data: URL of a video in base64 (data:video/mp4;base64,...): this server fetches "
               "no videos; send its bytes")  # fmt: skip
    content = url[match.end() :]
    try:
        if match[1].lower() == _FRAMES:
            return Video(tuple(base64.b64decode(frame, validate=True) for frame in content.split(",")))
        return Video(base64.b64decode(content, validate=True), DECODE_SECS)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name}.url: its base64 is damaged ({error})", f"{name}.url") from None


def pixels(clip: Video, format: Format, field: str) -> int:
    """Of all frames of a video's file; nothing is decoded.

    Raises:
      Refused: the model reads no videos, it is none, it has no frames, or they are too large.
    """
    if format.video is None:
        raise Refused(f"{field}: this model reads no videos: ask one that was trained with prompt.frames, or send "
                      "pictures", field)  # fmt: skip
    try:
        length = video.measure(clip)
    except (ValueError, MissingPackage) as error:
        raise Refused(f"{field}: {error}", field) from None
    if length.pixels > MAX_FRAME_PIXELS or length.pixels * length.frames > MAX_ALL_PIXELS:
        raise too_large(f"{length.frames:,} frames of {length.pixels:,} pixels", field)
    return length.pixels * length.frames


def too_large(what: str, field: str) -> Refused:
    """The refusal of videos beyond what is decoded."""
    return Refused(f"{field}: {what}, want at most {MAX_FRAME_PIXELS:,} a frame and {MAX_ALL_PIXELS:,} in all frames "
                   "of a request: shorten it or make it smaller", field)  # fmt: skip
