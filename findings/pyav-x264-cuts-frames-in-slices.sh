#!/usr/bin/env bash
# Guess: libx264 through PyAV runs in frame threads as ffmpeg does. The files differ little by the number of threads.
# Seen: PyAV opens every codec with thread_type SLICE, and libx264 takes this as its option sliced-threads, meant for
# low delay: each picture is cut into one slice per thread, of 64 lines or more, and slices predict nothing from each
# other. Files are larger (here by 10 % at four threads, three slices). As the default is one thread per core, they are
# other files on another machine. `thread_type = "FRAME"` before the first frame leaves one slice; the number of
# threads then changes the bytes a little, as in x264 itself. One thread gives the same bytes in both.
# Versions: PyAV 18.1.0 with libx264 core 165.
# Hurts: data sets and results written through PyAV: larger, and other bytes on another machine.
# Source: av/codec/context.py sets thread_type for encoders, too; libavcodec/libx264.c sets b_sliced_threads by it.
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
noise = np.random.default_rng(0).integers(0, 32, (384, 640, 1))
y, x = np.mgrid[:384, :640]
scene = (100 + 60 * np.sin(x / 17) + 40 * np.cos(y / 11)).astype(int)[..., None] + noise
scene = scene.clip(0, 255).repeat(3, axis=2).astype(np.uint8)


def encode(threads, thread_type):
    """Returns bytes, slices per picture."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 320, 192, "yuv420p", Fraction(1, 25)
    encoder.options = {"crf": "23", "threads": str(threads)}
    if thread_type:
        encoder.thread_type = thread_type
    packets = []
    for i in range(60):
        moved = np.ascontiguousarray(scene[i * i // 40:, 3 * i:][:192, :320])
        frame = av.VideoFrame.from_ndarray(moved, "rgb24")
        frame.pts = i
        packets += encoder.encode(frame)
    packets = [bytes(packet) for packet in packets + encoder.encode(None)]
    units = [unit[0] & 31 for unit in packets[-1].split(b"\0\0\1")[1:]]
    return sum(map(len, packets)), sum(unit in (1, 5) for unit in units)


seen = {(threads, kind): encode(threads, kind) for threads in (1, 2, 4) for kind in (None, "FRAME")}
for (threads, kind), (size, slices) in seen.items():
    print(f"{threads} threads, thread_type {kind or 'as PyAV sets it'}: {size} bytes, {slices} slices per picture")
slices = [found[1] for found in seen.values()]
larger = seen[4, None][0] / seen[4, "FRAME"][0]
sys.exit(0 if slices == [1, 1, 2, 1, 3, 1] and larger > 1.05 else "the behaviour has changed")
PY
