#!/usr/bin/env bash
# Guess: an orientation that an H.264 stream states at its key frame holds for the pictures that follow, and a decoder
# says so with each frame, as it does for the rotation in mp4's header.
# Seen: libavcodec gives the display matrix to the key frame alone, although the message says that it persists. Whoever
# turns each frame by its own matrix turns one frame per group of pictures and shows the others sideways; so does
# `ffmpeg` 5.1. `ffmpeg` of FFmpeg 9 turns all of them.
# Versions: PyAV 18.1.0 (FFmpeg 8.1).
# Hurts: readers of H.264 streams of cameras and phones in MPEG-TS or raw, where no header states a rotation.
# Source: libavcodec/h2645_sei.c (h2645_sei_to_frame), the display orientation SEI message of H.264's annex D.
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


def encode():
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 96, 64, "yuv420p", Fraction(1, 25)
    encoder.options = {"g": "250", "bf": "0"}
    packets = []
    for i in range(10):
        frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * i, np.uint8), "rgb24")
        frame.pts = i
        packets += encoder.encode(frame)
    return packets + encoder.encode(None)


def turned(packets):
    """Adds the message, 90 degrees, that persists (repetition period 1), to the key frame."""
    with av.open("plain.h264", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    with av.open("plain.h264") as container:
        turn = av.BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90",
                                         container.streams.video[0])
        found = []
        for packet in container.demux(video=0):
            found += turn.filter(packet if packet.size else None)
        return found


packets = turned(encode())
decoder = av.CodecContext.create("h264", "r")
frames = [frame for packet in packets for frame in decoder.decode(packet)] + decoder.decode(None)
print("key frames:", [int(frame.key_frame) for frame in frames])
rotations = [frame.rotation for frame in frames]
print("rotations:", rotations)
sys.exit(0 if rotations == [90] + [0] * 9 else "the behaviour has changed")
PY
