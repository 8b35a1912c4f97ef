#!/usr/bin/env bash
# Guess: seeking backward to the exact presentation time of a key frame lands on that key frame.
# Seen: in an mp4 of variable frame rate with B-frames, the seek lands on the key frame before, so that a whole group of
# pictures is decoded for nothing, and a reader that expects its key frame gets another one. The same packets in
# Matroska are found exactly; so are those of an mp4 at a constant rate. FFmpeg's mp4 index holds decoding times. It
# subtracts one delay for the whole file from the time asked for; in a file of variable rate that can be more than the
# key frame's own delay. Seeking to a time in the middle of the group finds its key frame.
# Versions: PyAV 18.1.0 (FFmpeg 8.1).
# Hurts: random access to screen recordings and to what phones record (PyAV, and whatever seeks by presentation time).
# Source: libavformat/mov.c, mov_seek_stream.
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
print("PyAV", av.__version__, "libavformat", av.library_versions["libavformat"])


def write(path, times):  # in 1/25 s
    noise = np.random.default_rng(0).integers(0, 256, (110, 64, 3), dtype=np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(noise[i:i + 48], "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def remux(source, path):
    with av.open(source) as old, av.open(path, "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)


def landed(path, middle=False):
    """For each key frame: how many key frames before it a seek to its time lands."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        keys = sorted(packet.pts for packet in container.demux(stream) if packet.size and packet.is_keyframe)
        found = []
        for i, key in enumerate(keys[:-1]):
            container.seek((key + keys[i + 1]) // 2 if middle else key, stream=stream)
            found.append(i - keys.index(next(container.demux(stream)).pts))
        return found


write("constant.mp4", range(60))
write("variable.mp4", [2 * i + i * i % 3 for i in range(60)])
remux("variable.mp4", "variable.mkv")
seen = {path: landed(path) for path in ("constant.mp4", "variable.mp4", "variable.mkv")}
seen["variable.mp4, middle of the group"] = landed("variable.mp4", middle=True)
for name, value in seen.items():
    print(f"{name}: lands {value} key frames early")
same = [any(value) for value in seen.values()] == [False, True, False, False]
sys.exit(0 if same else "the behaviour has changed")
PY
