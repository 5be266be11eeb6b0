"""Videos of a message: parts of type `video_url` as vLLM's clients send them, decoded in a process of their own."""

import base64
import binascii
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np

from llava_jax.prompt.conversation import Length, Video
from llava_jax.prompt.encode import Format
from llava_jax.prompt.images import Image
from llava_jax.serve.fields import Refused, refuse

# That all videos of a request may take; a minute of 1920 x 1080 takes 13 of a core (H.264 of 22 Mbit/s, PyAV 18.1,
# November 2026).
DECODE_SECS = 30.0
# A recording's type has parameters: data:video/webm;codecs=vp9,opus;base64,...
_DATA_URL = re.compile(r"data:video/([a-z0-9.+-]{1,40})(?:;[a-z0-9]{1,20}=[^;]{1,80})?;base64,", re.ASCII | re.I)
_FRAMES = "jpeg"  # of vLLM: frames as JPEG files, each in base64, between commas


def read(value: Any, name: str) -> Video:
    """The video of a part's `video_url`: the bytes of a file, or of pictures; none is opened yet.

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
        return Video(base64.b64decode(content, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name}.url: its base64 is damaged ({error})", f"{name}.url") from None


def opened(clip: Video, format: Format, field: str, until: float) -> Video:
    """The frames of a file that are shown, of the model's size already; pictures stay as they are.

    until: when it is given up, by `time.monotonic`.

    Raises:
      Refused: the model reads no videos, it is none, has no frames, or takes too much to be decoded.
    """
    if format.video is None:
        raise Refused(f"{field}: this model reads no videos: ask one that was trained with prompt.frames, or send "
                      "pictures", field)  # fmt: skip
    if not isinstance(clip.source, bytes):
        return clip
    settings = {"frames": format.video.frames, "fps": format.video.fps, "size": format.image_size,
                "mode": format.frame_mode, "mean": format.image_mean, "resample": format.resample}  # fmt: skip
    command = [sys.executable, "-m", "llava_jax.serve.decoder", json.dumps(settings)]
    try:
        done = subprocess.run(command, input=clip.source, capture_output=True,
                              timeout=max(0.0, until - time.monotonic()),
                              env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Refused(f"{field}: decoding the videos takes more than {DECODE_SECS:g} s: shorten them, make "
                      "them smaller or show fewer", field) from None  # fmt: skip
    line, _, pixels = done.stdout.partition(b"\n")
    answer = json.loads(line) if done.returncode == 0 else {"error": f"its decoder ended with {done.returncode}"}
    if "error" in answer:
        raise Refused(f"{field}: {answer['error']}", field)
    side = format.image_size
    shown = np.frombuffer(pixels, np.uint8).reshape(answer["shown"], side, side, 3)
    return Video(tuple(Image.fromarray(frame) for frame in shown), Length(answer["frames"], answer["rate"]))
