#!/usr/bin/env bash
# Guess: a decoder shows the rectangle that H.264's cropping names, to the pixel.
# Seen: libavcodec moves each plane's left edge only by multiples of 32 bytes, to keep memory aligned (of 64 columns
# in 4:2:0, of 32 in 4:4:4), and leaves the rest of the left border in the picture: a frame of 156 x 54 for a stream
# that says 150 x 54, with 6 columns that should be cut off.
# With the codec flag `unaligned`, which `ffmpeg` of FFmpeg 9 sets and that of FFmpeg 5.1 does not, the frame is right.
# Rows at the top are cut off as they should be; so are those on the right and at the bottom.
# Versions: PyAV 18.1.0 (FFmpeg 8.1).
# Hurts: readers of videos with a cropped left edge: frames of another size than the stream's, or cut on the wrong side.
# Source: libavutil/frame.c, av_frame_apply_cropping; AV_CODEC_FLAG_UNALIGNED.
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
import av, numpy as np

assert av.__version__ == "18.1.0", av.__version__
print("PyAV", av.__version__, "libavcodec", av.library_versions["libavcodec"])
WIDTH, HEIGHT = 160, 64


def decode(left, top, unaligned):
    """Returns the stream's size, the frame's size, column and row of the encoded picture in the frame's corner."""
    with av.open("crop.mkv", "w") as container:
        options = {"qp": "0", "x264-params": f"crop-rect={left},{top},4,8"}  # of right and bottom: 4, 8
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        places = np.indices((HEIGHT, WIDTH), dtype=np.uint8)
        planes = np.stack([places[0], places[1], places[0]])  # lossless: the first plane holds rows, the second columns
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv444p")))
        container.mux(stream.encode(None))
    with av.open("crop.mkv") as container:
        codec = container.streams.video[0].codec_context
        size = codec.width, codec.height
        if unaligned:
            codec.flags |= av.codec.context.Flags.unaligned
        frame = next(container.decode(video=0))
        row, column = frame.to_ndarray()[:2, 0, 0].tolist()
        return size, (frame.width, frame.height), (column, row)


seen = {(left, top, flag): decode(left, top, flag) for left, top in ((0, 2), (6, 2), (70, 2)) for flag in (False, True)}
for (left, top, flag), (size, shown, corner) in seen.items():
    print(f"{left} columns and {top} rows are cut off{', unaligned' if flag else ''}: stream {size}, frame {shown}, "
          f"its corner is column {corner[0]}, row {corner[1]}")
right = {case: case[:2] == corner and size == shown for case, (size, shown, corner) in seen.items()}
expected = {case: case[0] == 0 or case[2] for case in right}
sys.exit(0 if right == expected else "the behaviour has changed")
PY
