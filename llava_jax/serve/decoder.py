"""Decodes a video for the server, as a process of its own: `python -m llava_jax.serve.decoder JSON < FILE`.

A few bytes of a file may ask FFmpeg for gigabytes, or for minutes; here they cost this process alone, whose memory is
limited and which the server ends in time.
"""

import json
import resource
import sys

from llava_jax.errors import MissingPackage, UsageError
from llava_jax.prompt import video
from llava_jax.prompt.conversation import Length, Video
from llava_jax.prompt.images import to_pixels
from llava_jax.prompt.video import FrameRule

MAX_BYTES = 4 * 2**30  # of addresses; 8192 x 8192 pixels take 2 GB
MAX_FRAME_PIXELS, MAX_ALL_PIXELS = 16_000_000, 4_000_000_000  # of a frame, and of all frames of a video


def main() -> None:
    """Writes a line of JSON (`frames` and `rate` of the file, how many are `shown`; or `error`), then the frames that
    are shown, uint8 [size, size, 3] each."""
    if sys.platform == "linux":  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    try:
        length, shown = decoded(sys.stdin.buffer.read(), **json.loads(sys.argv[1]))
        answer = {"frames": length.frames, "rate": length.rate, "shown": len(shown)}
    except MemoryError:
        answer, shown = {"error": f"decoding it takes more than {MAX_BYTES >> 30} GB"}, []
    except (ValueError, MissingPackage) as error:
        answer, shown = {"error": str(error)}, []
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + b"".join(shown))


def decoded(
    content: bytes, frames: int, fps: float, size: int, mode: str, mean: list[float], resample: str
) -> tuple[Length, list[bytes]]:
    """How long a file is, and the pixels of its frames that are shown.

    frames, fps: as of `FrameRule`. size, mode, mean, resample: as of `to_pixels`.

    Raises:
      ValueError: it cannot be decoded, or is too large.
      MissingPackage: PyAV is not installed.
    """
    clip = Video(content)
    length = video.measure(clip)
    if length.pixels > MAX_FRAME_PIXELS or length.pixels * length.frames > MAX_ALL_PIXELS:
        raise UsageError(f"{length.frames:,} frames of {length.pixels:,} pixels, want at most {MAX_FRAME_PIXELS:,} a "
                         f"frame and {MAX_ALL_PIXELS:,} in all frames: shorten it or make it smaller")  # fmt: skip
    rule = FrameRule(frames, fps)
    return length, [to_pixels(frame, size, mode, tuple(mean), resample).tobytes() for frame in video.frames(clip, rule)]


if __name__ == "__main__":
    main()
