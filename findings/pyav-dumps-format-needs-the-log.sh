#!/usr/bin/env bash
# Guess: `container.dumps_format()` returns FFmpeg's description of a file, the text that `ffmpeg -i` shows.
# Seen: it returns an empty string, without a warning, unless PyAV's log level is INFO or finer; the level is None after
# an import. FFmpeg writes the description to its log, where PyAV collects it. So the same code works in a program that
# turned logging on, and not alone. Some things have no other name in PyAV, such as the cropping in mp4 and Matroska.
# Versions: PyAV 18.1.0, and 12.3.0, 13.1.0, 15.1.0, 16.1.0, 17.1.0.
# Hurts: who reads properties of a file out of this text.
# Source: av/container/core.py, dumps_format; libavformat/dump.c.
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
print("PyAV", av.__version__, "log level", av.logging.get_level())
with av.open("x.mkv", "w") as container:
    stream = container.add_stream("ffv1", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
    container.mux(stream.encode(None))
texts = {}
for name in (None, "ERROR", "WARNING", "INFO", "VERBOSE"):
    av.logging.set_level(name and getattr(av.logging, name))
    with av.open("x.mkv") as container:
        texts[name] = container.dumps_format()
    print(f"level {name}: {len(texts[name])} characters")
same = [bool(text) for text in texts.values()] == [False, False, False, True, True]
sys.exit(0 if same and "64x48" in texts["INFO"] else "the behaviour has changed")
PY
