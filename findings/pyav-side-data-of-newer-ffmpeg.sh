#!/usr/bin/env bash
# Guess: `frame.side_data` of PyAV lists what it knows and leaves out the rest.
# Seen: one entry of a kind that FFmpeg added later makes the whole attribute raise ValueError. PyAV 18.1.0 knows the
# kinds up to 27; the FFmpeg 8.1 in its wheels also gives 28 to 31 (LCEVC, view id, reference displays, EXIF). So the
# frames of a photograph with an EXIF block have no readable side data, and its orientation is out of reach;
# `frame.rotation` works, but it reports 180 degrees for a picture that is only mirrored.
# Versions: PyAV 18.1.0 (FFmpeg 8.1).
# Hurts: readers that ask each frame for its display matrix (cameras' motion JPEG, folders of photographs).
# Source: av/sidedata/sidedata.py (class Type) against libavutil/frame.h (AVFrameSideDataType).
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
"$FINDINGS_PYTHON" - <<'PY'
import sys
from fractions import Fraction
import av, numpy as np

assert av.__version__ == "18.1.0", av.__version__
print("PyAV", av.__version__, "libavcodec", av.library_versions["libavcodec"])

picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 90, np.uint8), "rgb24").reformat(format="yuvj420p")
encoder = av.CodecContext.create("mjpeg", "w")
encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 48, 32, "yuvj420p", Fraction(1, 25)
jpeg = b"".join(map(bytes, encoder.encode(picture) + encoder.encode(None)))


def with_exif(orientation):  # one TIFF entry, tag 0x0112
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0]) + bytes(4)
    block = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + jpeg[2:]


def decode(data):
    decoder = av.CodecContext.create("mjpeg", "r")
    return (decoder.decode(av.Packet(data)) + decoder.decode(None))[0]


def side_data(frame):
    try:
        return [str(entry.type) for entry in frame.side_data]
    except ValueError as error:
        return f"ValueError: {error}"


seen = {"without EXIF": side_data(decode(jpeg)), "orientation 1": side_data(decode(with_exif(1))),
        "orientation 6": side_data(decode(with_exif(6)))}
turns = {name: decode(with_exif(number)).rotation for name, number in (("mirrored", 2), ("upside down", 3))}
for name, value in (seen | turns).items():
    print(f"{name}: {value}")
same = (seen == {"without EXIF": [], "orientation 1": "ValueError: 31 is not a valid Type",
                 "orientation 6": "ValueError: 31 is not a valid Type"} and turns == {"mirrored": -180, "upside down": -180})
sys.exit(0 if same else "the behaviour has changed")
PY
