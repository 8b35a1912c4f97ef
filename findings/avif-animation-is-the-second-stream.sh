#!/usr/bin/env bash
# Guess: an animated AVIF file has one video stream, with all the pictures, as a GIF or an animated PNG.
# Seen: it has two, both marked as default: a single picture, the file's still image, and then the animation.
# `container.decode(video=0)` gives one frame. libavformat's own choice of the best stream is the animation, but the
# command `ffmpeg` of FFmpeg 9 takes the still image and writes one frame of eight. FFmpeg 6.1 (PyAV 12.3) still shows
# the animation alone; FFmpeg 7 (PyAV 13.1) and later show both.
# Versions: PyAV 18.1.0 (FFmpeg 8.1, both writer and reader).
# Hurts: readers that take the first video stream: PyAV's usual `video=0`, and what is built on it.
# Source: libavformat/mov.c, which makes streams of image items and of tracks.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
cd "$folder"
"$FINDINGS_PYTHON" - <<'PY'
import sys
from fractions import Fraction
import av, numpy as np

assert av.__version__ == "18.1.0", av.__version__
print("PyAV", av.__version__, "libavcodec", av.library_versions["libavcodec"])

with av.open("moving.avif", "w") as container:
    stream = container.add_stream("libsvtav1", rate=25, options={"preset": "12"})
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    for i in range(8):
        frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * i, np.uint8), "rgb24")
        frame.pts, frame.time_base = i, Fraction(1, 25)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
counts = []
with av.open("moving.avif") as container:
    best, streams = container.streams.best("video").index, len(container.streams.video)
    for stream in container.streams.video:
        print(f"stream {stream.index}: {stream.disposition}, average rate {stream.average_rate}")
for i in range(streams):
    with av.open("moving.avif") as container:
        counts.append(sum(1 for _ in container.decode(video=i)))
print("frames of each stream:", counts, "- the best stream:", best)
sys.exit(0 if counts == [1, 8] and best == 1 else "the behaviour has changed")
PY
