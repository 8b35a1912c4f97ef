#!/usr/bin/env bash
# Guess: `ffmpeg -ss t -i file -frames:v 1` gives the frame at t. Since FFmpeg 2.1 it decodes from the key frame before
# and drops what comes earlier, whatever the container.
# Seen: in AVI with B-frames it gives a frame too early, by two in H.264 and by one in MPEG-4, and for t = 0 a later one
# (here frames 50 and 3). Without B-frames, and in mp4 and Matroska, it is right. AVI stores no presentation times; a
# decode from the start gets them from the order of the frames, a seek does not.
# Versions: FFmpeg 9.0 (in imageio-ffmpeg 0.8.1); FFmpeg 5.1 does the same.
# Hurts: who extracts frames or cuts clips from old data sets in AVI; imageio's and moviepy's readers, which seek by -ss.
# Source: FFmpeg's documentation of -ss (accurate_seek).
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet imageio-ffmpeg==0.8.1 numpy==2.4.6
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
cd "$folder"
"$FINDINGS_PYTHON" - <<'PY'
import subprocess, sys
import imageio_ffmpeg, numpy as np

assert imageio_ffmpeg.__version__ == "0.8.1", imageio_ffmpeg.__version__
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
print("FFmpeg", imageio_ffmpeg.get_ffmpeg_version())
SOURCE = "-f lavfi -i nullsrc=s=64x64:r=25:d=4,geq=lum=40+2*N:cb=128:cr=128,format=yuv420p"  # frame N is grey 40 + 2 N


def run(arguments):
    return subprocess.run([FFMPEG, "-v", "error", *arguments.split()], check=True, capture_output=True).stdout


def greys(arguments):
    raw = run(f"{arguments} -pix_fmt gray -f rawvideo -")
    return np.frombuffer(raw, np.uint8).reshape(-1, 64 * 64).mean(axis=1)


seen = {}
for name, codec in {"h264.avi": "libx264 -bf 3", "mpeg4.avi": "mpeg4 -bf 2 -q:v 2", "no-b-frames.avi": "libx264 -bf 0",
                    "h264.mp4": "libx264 -bf 3", "h264.mkv": "libx264 -bf 3"}.items():
    run(f"{SOURCE} -c:v {codec} -g 25 {name}")
    frames = greys(f"-i {name} -fps_mode passthrough")
    found = [abs(frames - greys(f"-ss {i / 25} -i {name} -frames:v 1")[0]).argmin() for i in range(0, 90, 8)]
    seen[name] = [int(j) - i for i, j in zip(range(0, 90, 8), found)]
    print(f"{name}: frames {list(range(0, 90, 8))} are found off by {seen[name]}")
off, right = [seen["h264.avi"], seen["mpeg4.avi"]], [seen["no-b-frames.avi"], seen["h264.mp4"], seen["h264.mkv"]]
same = all(offsets[0] > 0 > max(offsets[1:]) for offsets in off) and not any(map(any, right))
sys.exit(0 if same else "the behaviour has changed")
PY
