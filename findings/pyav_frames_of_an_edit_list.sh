#!/usr/bin/env bash
# A clip that was cut without encoding it anew (`ffmpeg -ss ... -c copy`) holds frames before its first one, which an edit
# list hides. PyAV's `stream.frames`, FFmpeg's `nb_frames`, counts them, decoding does not give them. Code that chooses
# frames by `stream.frames`, as LLaVA-NeXT's llava/utils.py process_video_with_pyav@0b625a4, then asks for some that never
# come: it shows fewer, or none, of the end. Remedy: count the entries of `stream.index_entries` without `is_discard`, or
# where the container has no index the packets of which that holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import av
import numpy as np

with av.open("whole.mp4", "w") as container:
    stream = container.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(50):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
with av.open("whole.mp4") as old, av.open("cut.mp4", "w") as new:  # what `ffmpeg -ss 0.8 -i whole.mp4 -c copy` writes
    stream = old.streams.video[0]
    out, shift = new.add_stream_from_template(stream), int(20 / 25 / stream.time_base)
    for packet in old.demux(stream):
        if packet.size:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, out
            new.mux(packet)
with av.open("cut.mp4") as container:
    stream = container.streams.video[0]
    said, shown = stream.frames, sum(not entry.is_discard for entry in stream.index_entries)
    decoded = sum(1 for _ in container.decode(stream))
print(f"PyAV {av.__version__}: stream.frames {said}, index without hidden ones {shown}, decoded {decoded}")
if said == decoded or shown != decoded:
    sys.exit("this finding is out of date")
PYTHON
