"""Small copies: python -m pytest tools/test_shrink.py. The copies are read by FFmpeg's command line, too."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg

import cmaev
from tools import shrink

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities"),  # of write_jpeg
              pytest.mark.filterwarnings("ignore:Unable to enable fault handler")]  # pytest has taken stderr
slow = pytest.mark.skipif("SLOW" not in os.environ and "LONG" not in os.environ, reason="SLOW=1 pytest")


def numbered(i, height, width):
    """A frame with the number i, below 64, in six stripes of two colours."""
    bits = (i >> np.arange(width) * 6 // width) & 1
    return np.repeat(np.uint8([[20, 90, 30], [230, 110, 200]])[None, bits], height, axis=0)


def middles(frames):
    """The colours in the middles of the stripes [n, 6, 3]."""
    _, height, width, _ = frames.shape
    return frames[:, height // 2, (2 * np.arange(6) + 1) * width // 12].astype(float)


def write(path, frames, codec="libx264", times=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p" if codec == "mpeg4" else "yuv444p"
        for pts, image in zip(times or range(len(frames)), frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def probe(path, entries):
    command = ["ffprobe", "-v", "error", "-select_streams", "v", "-of", "csv=p=0", "-show_entries", entries, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace(",", "").split()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["shrink", *map(str, arguments)])
    cmaev.run_script(shrink.main)


@pytest.fixture
def data(tmp_path):
    """A list of five videos with labels, one of them twice, and a bad one."""
    root, frames = tmp_path / "data", [numbered(i, 66, 97) for i in range(40)]
    write(root / 'one, "two"' / "x.mkv", frames, times=[i * i // 3 + 7 * i for i in range(40)])  # varies
    write(root / 'one, "two"' / "x.avi", frames, "mpeg4", q="1")
    rotated = root / 'one, "two"' / "x.mp4"
    write(rotated, [np.rot90(frame) for frame in frames])
    turned = bytearray(rotated.read_bytes())  # the matrix of the box tkhd: clockwise by 90 degrees
    struct.pack_into(">6i", turned, turned.index(b"tkhd") + 44, 0, 65536, 0, -65536, 0, 0)
    rotated.write_bytes(turned)
    write(root / "other" / "small.mp4", [numbered(i, 35, 49) for i in range(40)])
    (root / "other" / "frames").mkdir()
    for i, frame in enumerate(frames):
        picture = torch.from_numpy(frame).movedim(-1, 0).contiguous()
        write_jpeg(picture, str(root / "other" / "frames" / f"{i}.jpg"))
    (root / "other" / "bad.mp4").write_bytes((root / "other" / "small.mp4").read_bytes()[:500])
    names = ['one, "two"/x.mkv', "other/bad.mp4", "other/frames", 'one, "two"/x.avi', 'one, "two"/x.mp4',
             "other/small.mp4", "other/frames"]
    (root / "train.csv").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    return root


def test_copies_have_the_same_frames_labels_and_times(tmp_path, monkeypatch, capsys, data):
    copy, originals = tmp_path / "copy", [path for path in data.rglob("*") if path.is_file()]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in originals]
    run(monkeypatch, data / "train.csv", copy, "--side", 48, "--keyframes", 12)
    output = capsys.readouterr().out
    assert "bad.mp4: cannot be opened" in output and "6 videos; 1 left out" in output
    names = ['one, "two"/x.mkv.mp4', "other/frames.mp4", 'one, "two"/x.avi.mp4', 'one, "two"/x.mp4',
             "other/small.mp4"]
    listed = zip([*names, names[1]], [0, 2, 3, 4, 5, 6])
    assert cmaev.read_list(copy / "train.csv") == [(f"{copy}/{name}", label) for name, label in listed]
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in originals] == before
    for name, size in zip(names, [*4 * [(48, 70)], (34, 48)]):
        read = cmaev.Video(copy / name).read(range(40)).numpy()
        original = data / (name if name in names[3:] else name.removesuffix(".mp4"))
        source = cmaev.Video(original).read(range(40)).numpy()
        assert read.shape[1:3] == size
        numbers = (middles(read).mean(axis=-1) > 110) @ (1 << np.arange(6))
        assert numbers.tolist() == list(range(40)), name
        assert np.abs(middles(read) - middles(source)).mean() < 3, name
    if shutil.which("ffprobe"):
        times, original = (np.array(probe(path, "frame=pts_time"), float)
                           for path in (copy / names[0], data / 'one, "two"' / "x.mkv"))
        assert len(times) == 40 and np.abs(times - times[0] - (original - original[0])).max() < 1e-5
        for name in names:
            keys = [i for i, flags in enumerate(probe(copy / name, "frame=key_frame")) if flags[0] == "1"]
            assert keys == [0, 12, 24, 36]
    run(monkeypatch, data / "train.csv", copy, "--side", 48)
    assert "5 of them copied already" in capsys.readouterr().out


def test_wrong_folders(tmp_path, monkeypatch, data):
    """One line each, and nothing is written."""
    write(data / "other" / "frames.mp4", [numbered(0, 32, 32)])
    (data / "both.txt").write_text("other/frames\nother/frames.mp4\n")
    (data / "one.txt").write_text("other/small.mp4\n")
    for source, copy, message in [
            ("one.txt", data / "other", "keep copies and originals apart"), ("one.txt", data, "apart"),
            ('one, "two"', data / 'one, "two"/copy', "apart"),
            ("both.txt", tmp_path / "copy", "would both become frames.mp4")]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(monkeypatch, data / source, copy)
        assert sorted(tmp_path.rglob("*")) == before
    run(monkeypatch, data / "one.txt", tmp_path / "copy")
    with pytest.raises(SystemExit, match="^error: .*was begun with .*'side': 170.*new folder$"):
        run(monkeypatch, data / "one.txt", tmp_path / "copy", "--side", 128)


@slow
def test_goes_on_after_a_kill(tmp_path, data):
    """kill -9 of a worker ends the run with one line. After it, and one of the run, all copies become whole."""
    film = [numbered(i % 64, 240, 320) for i in range(200)]
    source, copy = tmp_path / "films", tmp_path / "copy"
    write(source / "0.mp4", film, preset="ultrafast")
    for i in range(1, 5):
        shutil.copy(source / "0.mp4", source / f"{i}.mp4")
    command = [sys.executable, "-m", "tools.shrink", source, copy]
    one_core = min(os.sched_getaffinity(0))  # one worker
    for victim in ("worker", "run"):
        there = len(list(copy.rglob("*.mp4")))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: os.sched_setaffinity(0, [one_core]))
        while len(list(copy.rglob("*.mp4"))) == there:
            assert process.poll() is None
            time.sleep(0.02)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[0]) if victim == "worker" else process.pid, signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
        assert process.returncode and (victim == "run" or "goes on" in error and error.count("\n") == 1)
    assert len(list(copy.rglob("*.mp4"))) < 5 and not (copy / "list.txt").exists()
    subprocess.run(command, check=True)
    for path, _ in cmaev.read_list(copy / "list.txt"):
        assert len(cmaev.Video(path)) == 200
    assert len(cmaev.read_list(copy / "list.txt")) == 5 and not list(copy.rglob("*.partial"))
