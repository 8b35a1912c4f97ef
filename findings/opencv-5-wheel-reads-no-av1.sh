#!/usr/bin/env bash
# Guess: what the wheel of OpenCV 4 reads, that of OpenCV 5 reads, too: both carry the same FFmpeg, libavcodec 62.28.
# Seen: the wheel of 5.0.0.93 has no libdav1d. It opens an AV1 file, counts its frames, and `read()` returns False for
# each. That of 4.14.0.94 has libdav1d and reads all. FFmpeg's own AV1 decoder only drives a GPU's.
# Versions: opencv-python-headless 4.14.0.94 and 5.0.0.93 (Linux x86-64); the file is written by PyAV 18.1.0.
# Hurts: who upgrades: AV1 clips are skipped or end in None, although isOpened() and CAP_PROP_FRAME_COUNT look right.
# Source: the libraries in the wheels (opencv_python_headless.libs).
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
cd "$folder"
for version in 4.14.0.94 5.0.0.93; do  # beside the Python's own packages, also where FINDINGS_PYTHON is given
    "$FINDINGS_PYTHON" -m pip install --quiet --no-deps --target "$version" "opencv-python-headless==$version"
done
cat > write.py <<'PY'
from fractions import Fraction
import av, numpy as np

assert av.__version__ == "18.1.0", av.__version__
for codec, name in (("libsvtav1", "av1.mp4"), ("libx264", "h264.mp4")):
    with av.open(name, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
PY
cat > read.py <<'PY'
import cv2

for name in ("av1.mp4", "h264.mp4"):
    video, read = cv2.VideoCapture(name, cv2.CAP_FFMPEG), 0
    while video.read()[0]:
        read += 1
    print(cv2.__version__, name, "opened" if video.isOpened() else "not opened", "counted",
          int(video.get(cv2.CAP_PROP_FRAME_COUNT)), "read", read)
PY
"$FINDINGS_PYTHON" write.py 2>/dev/null
for version in 4.14.0.94 5.0.0.93; do
    PYTHONPATH=$version "$FINDINGS_PYTHON" read.py 2>/dev/null
done | tee seen
cat > expected <<'END'
4.14.0 av1.mp4 opened counted 10 read 10
4.14.0 h264.mp4 opened counted 10 read 10
5.0.0 av1.mp4 opened counted 10 read 0
5.0.0 h264.mp4 opened counted 10 read 10
END
cmp -s seen expected || { echo "the behaviour has changed"; exit 1; }
