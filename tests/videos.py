"""Small videos, written as files and as folders of frames."""

from pathlib import Path

import numpy as np
from PIL import Image

# The name of a file -> the codec in it, and what FFmpeg calls its pixels.
KINDS = {"a.mp4": ("libx264", "yuv420p"), "a.mkv": ("libx264", "yuv420p"), "a.webm": ("libvpx-vp9", "yuv420p"),
         "a.avi": ("mpeg4", "yuv420p"), "a.mov": ("mpeg4", "yuv420p"), "a.ts": ("libx264", "yuv420p"),
         "a.flv": ("flv", "yuv420p"), "a.gif": ("gif", "rgb8")}  # fmt: skip


def moving(count: int, size: tuple[int, int] = (64, 48), seed: int = 0) -> list[np.ndarray]:
    """Frames uint8 [height, width, 3], each of another grey, with a bright column that moves."""
    width, height = size
    frames = []
    for i in range(count):
        frame = np.full((height, width, 3), (seed * 17 + i * 4) % 200, np.uint8)
        frame[:, i % width] = 255
        frames.append(frame)
    return frames


def write(path: Path, frames: list[np.ndarray], rate: int = 25) -> Path:
    """A video file of the kind that its name says; some frames refer to later ones where the codec can."""
    import av

    codec, pixels = KINDS[f"a{path.suffix}"]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"bf": "2"} if codec in ("libx264", "mpeg4") else {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_folder(folder: Path, frames: list[np.ndarray]) -> Path:
    """A folder of frames, 0.png to N.png, and a file that is none."""
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


def cut_without_encoding(path: Path, source: Path, hidden: int) -> Path:
    """A copy whose edit list hides the first frames, as `ffmpeg -ss ... -c copy` leaves it."""
    import av

    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        out, shift = new.add_stream_from_template(stream), hidden * int(1 / (stream.average_rate * stream.time_base))
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, out
                new.mux(packet)
    return path
