#!/usr/bin/env bash
# Guess: libx264 makes the same file from the same frames and settings. Its option `non-deterministic`, off as a rule,
# trades repeatability for quality.
# Seen: with a cap on the bit rate (vbv-maxrate, vbv-bufsize) and more than one thread, runs of the same encoder on the
# same frames on the same machine give different bytes, for example if frames come slowly in one of them. A frame's
# rate control looks at how far the threads of the frames before have come. With one thread, or without cap and mbtree,
# the bytes are the same. (With mbtree, preset veryfast, crf 18 and four threads, 6 of 105 runs differed without a cap.
# All runs here are without mbtree.)
# Versions: libx264 core 165, in PyAV 18.1.0 with frame threads, as ffmpeg uses them.
# Hurts: check sums of data sets, caches and tests that expect the bytes of an earlier run.
# Source: x264's encoder/ratecontrol.c (predictions of frames in progress) against `x264 --fullhelp`.
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
import time
from fractions import Fraction
import av, numpy as np

assert av.__version__ == "18.1.0", av.__version__
print("PyAV", av.__version__, "libavcodec", av.library_versions["libavcodec"])
noise = np.random.default_rng(0).integers(0, 32, (384, 640, 1))
y, x = np.mgrid[:384, :640]
scene = (100 + 60 * np.sin(x / 17) + 40 * np.cos(y / 11)).astype(int)[..., None] + noise
scene = scene.clip(0, 255).repeat(3, axis=2).astype(np.uint8)
frames = [np.ascontiguousarray(scene[i * i // 40:, 3 * i:][:192, :320]) for i in range(80)]


def encode(threads, options, pause=0):
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 320, 192, "yuv420p", Fraction(1, 25)
    encoder.options = {"crf": "23", "threads": str(threads)} | options
    encoder.thread_type = "FRAME"
    data = b""
    for i, image in enumerate(frames):
        time.sleep(pause)
        frame = av.VideoFrame.from_ndarray(image, "rgb24")
        frame.pts = i
        data += b"".join(map(bytes, encoder.encode(frame)))
    return data + b"".join(map(bytes, encoder.encode(None)))


FREE = {"x264-params": "mbtree=0:sync-lookahead=0"}
VBV = {"x264-params": FREE["x264-params"] + ":vbv-maxrate=300:vbv-bufsize=300"}
seen = {}
for name, threads, options, most in (("1 thread, capped", 1, VBV, 4), ("4 threads, not capped", 4, FREE, 8),
                                     ("4 threads, capped", 4, VBV, 40)):
    files, runs = set(), 0
    while runs < most and len(files) < 2:
        files.add(encode(threads, options, pause=0.01 * (runs % 2)))
        runs += 1
    seen[name] = len(files)
    print(f"{name}: {len(files)} different files in {runs} runs, {sorted(map(len, files))} bytes")
same = seen.pop("4 threads, capped") > 1 and set(seen.values()) == {1}
sys.exit(0 if same else "the behaviour has changed")
PY
