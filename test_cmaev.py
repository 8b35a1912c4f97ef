"""Every part against something independent of it: a slow loop, float64, a plain decode, one process against two."""

import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

GPU = "GPU" in os.environ  # tests that want one: GPU=1 pytest -k gpu; all others run on the CPU, where sums repeat
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.io import write_jpeg, write_png

import cmaev
import finetune
import pretrain

HERE = Path(__file__).parent
LONG = "LONG" in os.environ  # the fault tests at full length: LONG=1 pytest -k faults
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")  # torchvision 0.29


# ---------------------------------------------------------------------------------------------------------------------
# 1  Video in
# ---------------------------------------------------------------------------------------------------------------------


def write(path, codec="libx264", frames=60, size=(48, 64), pixels="yuv420p", times=None, muxer={}, title="",
          **options):
    """A video file of noise that moves, each frame unlike the others; `times` are its timestamps in 1/25 s."""
    height, width = size
    noise = np.random.default_rng(0).integers(0, 256, (height + frames, width, 3), dtype=np.uint8)
    times = times or range(frames)
    with av.open(str(path), "w", options=muxer) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25, options={k.replace("_", "-"): v for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        packets = []
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[i:i + height]), "rgb24")
            frame.pts, frame.time_base = t - min(times), Fraction(1, 25)
            packets += stream.encode(frame)
        for packet in packets + stream.encode(None):
            packet.pts, packet.dts = packet.pts + min(times), packet.dts + min(times)
            container.mux(packet)
    return path


def plain_decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


X265 = "log-level=none:keyint=12:bframes=4:open-gop="
FILES = {
    "h264.mp4": dict(),
    "h264-short-gop.mp4": dict(g="7", bf="3"),
    "h264-open-gop.mkv": dict(x264_params="open-gop=1:keyint=12:bframes=3"),
    "h264.avi": dict(bf="2", g="12"),
    "h264.ts": dict(g="12"),
    "h264-no-timestamps.h264": dict(g="12"),
    "h264-variable-rate.mp4": dict(times=[i * 2 + (i * i) % 3 for i in range(60)], g="12"),
    "h264-late-start.mkv": dict(times=range(30, 90), g="12"),
    "h264-discarded-leading.mp4": dict(times=range(-10, 50), muxer=dict(avoid_negative_ts="disabled"), g="25"),
    "h264-10-bit.mp4": dict(pixels="yuv420p10le", g="12"),
    "h264-444.mp4": dict(pixels="yuv444p", size=(47, 63), g="12"),
    "hevc-open-gop.mp4": dict(codec="libx265", x265_params=X265 + "1"),
    "hevc-10-bit.mkv": dict(codec="libx265", pixels="yuv420p10le", x265_params=X265 + "0"),
    "vp9.webm": dict(codec="libvpx-vp9", g="15", cpu_used="8", deadline="realtime"),
    "vp9-hidden-frames.webm": dict(codec="libvpx-vp9", auto_alt_ref="1", lag_in_frames="16", cpu_used="8"),
    "av1.webm": dict(codec="libsvtav1", preset="12", svtav1_params="keyint=20"),
    "av1.mp4": dict(codec="libsvtav1", preset="12", frames=33),
    "mpeg4.avi": dict(codec="mpeg4", bf="2"),
    "mpeg4.mov": dict(codec="mpeg4", bf="2", size=(35, 51)),
    "ffv1.mkv": dict(codec="ffv1", pixels="yuv420p", size=(47, 63)),
    "one-frame.mp4": dict(frames=1),
}


@pytest.mark.parametrize("name", FILES)
def test_read_equals_a_plain_decode(tmp_path, name):
    path = write(tmp_path / name, **FILES[name])
    expected = plain_decode(path)
    video, rng = cmaev.Video(path), np.random.default_rng(1)
    assert len(video) == len(expected) == (50 if "discarded" in name else FILES[name].get("frames", 60))
    for _ in range(8):
        indices = rng.integers(0, len(video), rng.integers(1, 12))  # unsorted, with repeats
        assert np.array_equal(video.read(indices), expected[indices])
    assert np.array_equal(video.read(range(len(video))), expected)


@pytest.mark.parametrize("matrix, shown", {
    (1, 0, 0, 1): lambda x: x, (-1, 0, 0, 1): lambda x: x[:, :, ::-1], (1, 0, 0, -1): lambda x: x[:, ::-1],
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2, (1, 2)), (0, 1, -1, 0): lambda x: np.rot90(x, -1, (1, 2)),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1, (1, 2)), (0, 1, 1, 0): lambda x: x.swapaxes(1, 2),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2, (1, 2)).swapaxes(1, 2), (0, 0, 0, 0): lambda x: x}.items())
def test_display_matrix(tmp_path, matrix, shown):
    """The eight turned and mirrored ones, written into the track header by hand (ISO 14496-12: a b u c d v x y w)."""
    data = write(tmp_path / "upright.mp4", frames=5).read_bytes()
    a, b, c, d = (v << 16 for v in matrix)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data[:at] + matrix + data[at + 36:])
    upright, turned = (cmaev.Video(tmp_path / f"{name}.mp4").read(range(5)).numpy() for name in ("upright", "turned"))
    assert np.array_equal(turned, shown(upright))


def test_display_matrix_of_another_angle(tmp_path):
    """A turn by 30 degrees is refused: FFmpeg would draw the picture anew."""
    data = write(tmp_path / "v.mp4", frames=5).read_bytes()
    at = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    matrix = struct.pack(">9i", 56756, 32768, 0, -32768, 56756, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data[:at] + matrix + data[at + 36:])
    with pytest.raises(cmaev.BadVideo, match="no multiple of 90 degrees"):
        cmaev.Video(tmp_path / "turned.mp4").read([0])


def decode_from_start(path):
    """Every frame of the best stream: packet by packet, errors passed over, the decoder flushed."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # what is made up for damaged frames depends on it
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                packet = None
            try:
                if packet is None or packet.size:
                    frames += [frame.to_ndarray(format="rgb24") for frame in stream.codec_context.decode(packet)]
            except av.error.FFmpegError:
                pass
            if packet is None:
                return np.stack(frames)


def same_frames(path, count=None):
    """Video against decode_from_start: the number of frames, each frame alone in random order, all in one read."""
    expected, video = decode_from_start(path), cmaev.Video(path)
    assert len(video) == len(expected) == (count or len(expected))
    for i in np.random.default_rng(2).permutation(len(expected)).tolist():
        assert np.array_equal(video.read([i])[0], expected[i]), i
    assert np.array_equal(video.read(range(len(video))), expected)
    return video


def remux(source, target, change=lambda i, packet: True, **options):
    """Copies the packets of a file, in their order, of which `change(i, packet)` is true."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.size and change(i, packet):
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="wants Debian's ffmpeg")
@pytest.mark.parametrize("name", FILES)
def test_read_equals_ffmpegs_own_decode(tmp_path, name):
    path = write(tmp_path / name, **FILES[name])
    video = cmaev.Video(path)
    frames = video.read(range(len(video))).numpy().astype(int)
    raw = subprocess.run(["ffmpeg", "-v", "quiet", "-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt",
                          "rgb24", "-"], capture_output=True, check=True).stdout
    truth = np.frombuffer(raw, np.uint8).reshape(-1, *frames.shape[1:])
    assert len(truth) == len(frames)
    for i, frame in enumerate(frames):  # versions of FFmpeg convert 10 bits and odd sizes to RGB differently
        distance = np.abs(truth - frame).mean(axis=(1, 2, 3))
        assert distance.argmin() == i and distance[i] < 12


def test_packed_b_frames(tmp_path):
    """As XviD and DivX write AVI files: a P-frame and its first B-frame in one packet, a frame not coded at the end."""
    source = write(tmp_path / "b.avi", codec="mpeg4", frames=40, bf="2", g="12", b_strategy="0")
    with av.open(str(source)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    is_b, packed = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 == 2 for data in packets] + [False], []
    not_coded = b"\0\0\1\xb6" + bytes([0b01010000, 0b01011111])  # a P-frame, time 0 of 25
    for i, data in enumerate(packets):
        if is_b[i] and not is_b[i - 1]:
            packed[-1] += data
        else:
            packed.append(data)
        if is_b[i] and not is_b[i + 1]:
            packed.append(not_coded)
    start = packed[0].index(b"\0\0\1\xb2" if b"\0\0\1\xb2" in packed[0] else b"\0\0\1\xb6")
    packed[0] = packed[0][:start] + b"\0\0\1\xb2DivX503b1393p" + packed[0][packed[0].index(b"\0\0\1\xb6"):]
    with av.open(str(source)) as old, av.open(str(tmp_path / "packed.avi"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, data in enumerate(packed):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
            packet.is_keyframe = data[data.index(b"\0\0\1\xb6") + 4] >> 6 == 0
            new.mux(packet)
    assert len(packed) >= 38
    same_frames(tmp_path / "packed.avi")
    same_frames(source)


def test_large_files_without_an_index_are_decoded_for_each_read(tmp_path, monkeypatch):
    path = write(tmp_path / "v.avi", codec="mpeg4", frames=40, bf="2")
    kept = cmaev.Video(path).read(range(40))
    monkeypatch.setattr(cmaev, "MAX_KEPT", 10 * 48 * 64)
    video = cmaev.Video(path)
    assert video.kept is None and torch.equal(video.read(range(40)), kept)
    assert torch.equal(video.read([31, 5, 5]), kept[[31, 5, 5]])
    assert cmaev.last_line(cmaev.BadVideo("x\ncmaev.BadVideo: y")) == "y"


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_mp4_without_a_sync_table(tmp_path, codec):
    """Every sample then passes for a key frame."""
    data = write(tmp_path / "v.mp4", codec=codec, g="30").read_bytes()
    assert data.count(b"stss") == 1
    (tmp_path / "no-sync.mp4").write_bytes(data.replace(b"stss", b"free"))
    same_frames(tmp_path / "no-sync.mp4", 60)


def test_a_file_that_refuses_to_seek(tmp_path):
    """The sync table names sample 9 as the first key frame: seeking to the start is an error."""
    data = bytearray(write(tmp_path / "v.mp4", g="60").read_bytes())
    at = data.index(b"stss")
    assert data[at + 8:at + 16] == bytes([0, 0, 0, 1, 0, 0, 0, 1])
    data[at + 15] = 9
    (tmp_path / "other-key.mp4").write_bytes(data)
    same_frames(tmp_path / "other-key.mp4", 60)


@pytest.mark.parametrize("name, options", {
    "h264.ts": {}, "open-gop.ts": dict(x264_params="open-gop=1:keyint=12:bframes=3"), "hevc.ts": dict(codec="libx265",
    x265_params=X265 + "1"), "mpeg2.ts": dict(codec="mpeg2video", bf="2", g="12"), "mpeg4.avi": dict(codec="mpeg4")
}.items())
@pytest.mark.parametrize("suffix", ["same", "mkv"])
def test_streams_that_begin_inside_a_group_of_pictures(tmp_path, name, options, suffix):
    source = write(tmp_path / name, **{"g": "12"} | options)
    cut = remux(source, tmp_path / f"cut{source.suffix if suffix == 'same' else '.mkv'}", lambda i, packet: i >= 7)
    with av.open(str(cut)) as container:
        packets = sum(packet.size > 0 for packet in container.demux(video=0))
    video = same_frames(cut)
    assert len(video) < packets or "mpeg4" in name


@pytest.mark.parametrize("name, options", {
    "fast.mp4": dict(muxer=dict(movflags="faststart")), "v.mkv": {}, "v.ts": {}, "v.avi": dict(codec="mpeg4"),
    "parts.mp4": dict(muxer=dict(movflags="frag_keyframe+empty_moov")), "v.flv": {}, "v.webm": dict(codec="libvpx"),
    "v.h264": {}}.items())
def test_truncated_files(tmp_path, name, options):
    data, counts = write(tmp_path / name, **{"g": "12"} | options).read_bytes(), set()
    for share in (0.5, 0.8, 0.95):
        path = tmp_path / f"{share}-{name}"
        path.write_bytes(data[:int(share * len(data))])
        counts.add(len(same_frames(path)))
    assert len(counts) == 3 and min(counts) < 40


def test_the_best_of_several_video_streams(tmp_path):
    """A cover of one frame as the first stream; a smaller film before the larger one."""
    film = [np.full((48, 64, 3), 8 * i, np.uint8) for i in range(30)]
    still, small = (np.zeros((*size, 3), np.uint8) for size in ((200, 200), (32, 48)))
    for name, first in {"cover.mkv": ("mjpeg", "yuvj420p", [still]), "two.mkv": ("ffv1", "bgr0", [small] * 30)}.items():
        with av.open(str(tmp_path / name), "w") as container:
            streams = []
            for codec, pixels, frames in (first, ("ffv1", "bgr0", film)):
                height, width, _ = frames[0].shape
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width, stream.pix_fmt = height, width, pixels
                streams.append((stream, frames))
            streams[0][0].disposition = av.stream.Disposition(0)
            streams[1][0].disposition = av.stream.Disposition.default
            for stream, frames in streams:
                packets = [p for frame in frames for p in stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24"))]
                container.mux(packets + stream.encode(None))
        video = cmaev.Video(tmp_path / name)
        assert len(video) == 30 and np.array_equal(video.read([7, 3]), np.stack([film[7], film[3]]))


def test_a_change_of_size_inside_a_file(tmp_path):
    """All frames come out at the size of the first one, as from ffmpeg."""
    parts = [write(tmp_path / f"{size[0]}.h264", frames=20, size=size) for size in ((48, 64), (96, 80))]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert cmaev.Video(tmp_path / "both.h264").read(range(40)).shape == (40, 48, 64, 3)


def png_16_bit(value, side=8):
    """A grey PNG of 16 bits by hand (W3C PNG: signature, IHDR, IDAT, IEND)."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + struct.pack(">H", value) * side for _ in range(side))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("value, expected", [(0, 0), (32768, 128), (65535, 255)])
def test_png_of_16_bits(tmp_path, value, expected):
    (tmp_path / "0.png").write_bytes(png_16_bit(value))
    frame = cmaev.Video(tmp_path).read([0])
    assert frame.dtype == torch.uint8 and frame.unique().tolist() == [expected]


def test_orientation_in_exif(tmp_path):
    """The eight orientations of TIFF, written into the file by hand, against numpy."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:8, :8], picture[8:, 24:] = 255, 128
    write_jpeg(torch.from_numpy(picture).permute(2, 0, 1), str(tmp_path / "plain.jpg"), quality=100)
    data = (tmp_path / "plain.jpg").read_bytes()
    shown = {1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.swapaxes(0, 1),
             6: np.rot90(picture, -1), 7: np.rot90(picture, 2).swapaxes(0, 1), 8: np.rot90(picture)}
    for orientation, expected in shown.items():
        exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0]) + bytes(4)
        folder = tmp_path / str(orientation)
        folder.mkdir()
        (folder / "0.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
        frame = cmaev.Video(folder).read([0])[0].numpy().astype(int)
        assert frame.shape == expected.shape and np.abs(frame - expected).mean() < 3, orientation


def test_pictures_that_cannot_be_cropped_are_bad_videos(tmp_path, demo):
    (tmp_path / "0.png").write_bytes(png_16_bit(9, side=1))
    good, _ = cmaev.read_list(demo / "train.txt")[0]
    clips = cmaev.PretrainClips([(str(tmp_path), 0), (good, 0)], (2, 4, 4), frames=4, rate=2, max_shift=4, size=32)
    assert clips[0, 0]["replaced"].all() and not clips[0, 1]["replaced"].any()


def test_formats(tmp_path):
    for name, options in {"v.y4m": dict(codec="rawvideo"), "v.apng": dict(codec="apng", pixels="rgb24"),
                          "v.mjpeg": dict(codec="mjpeg", pixels="yuvj420p"), "v.gif": dict(codec="gif", pixels="rgb8"),
                          "v.mxf": dict(codec="mpeg2video"), "v.vob": dict(codec="mpeg2video"), "v.m2ts": {},
                          "v.rm": dict(codec="rv20", size=(48, 64))}.items():
        if options.get("codec") in av.codecs_available or not options:
            same_frames(write(tmp_path / name, **{"codec": "libx264"} | options), 60)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nv.y4m\n#EXT-X-ENDLIST\n")
    with pytest.raises(cmaev.BadVideo, match="format is not allowed"):
        cmaev.Video(tmp_path / "list.m3u8")


@pytest.mark.parametrize("b_frames", [0, 3])
def test_read_seeks_and_decodes_once(tmp_path, monkeypatch, b_frames):
    path = write(tmp_path / "v.mp4", frames=240, g="40", bf=str(b_frames), x264_params="scenecut=0")
    video, decoded = cmaev.Video(path), []
    decode = video._decode
    monkeypatch.setattr(video, "_decode", lambda asked: (decoded.append(video.times.index(frame.pts)) or frame
                                                         for frame in decode(asked)))
    video.read([210, 205, 215, 205])
    between = list(range(200, 216))  # from the key frame before, to the last frame wanted
    video.read([5, 125, 130])
    between += [*range(6), *range(120, 131)]  # nothing between
    if b_frames == 0:
        assert decoded == between
    else:  # and of those no B-frame that nobody asked for and no other refers to
        assert {205, 210, 215, 5, 125, 130} <= set(decoded) < set(between) and len(decoded) < 0.8 * len(between)


def test_tags_in_another_encoding(tmp_path):
    """Titles of old files are often in Latin-1; nobody here reads them."""
    good, other = write(tmp_path / "v.mp4", frames=5, title="Caf\u00e9"), tmp_path / "latin1.mp4"
    other.write_bytes(good.read_bytes().replace("Caf\u00e9".encode(), b"Caf\xe9\xe9"))
    if cmaev.ANY_METADATA:
        with pytest.raises(UnicodeDecodeError):
            av.open(str(other))
    assert torch.equal(cmaev.Video(other).read(range(5)), cmaev.Video(good).read(range(5)))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_folder_of_frames_in_natural_order(tmp_path, suffix):
    for i in range(12):
        frame = torch.full((3, 16, 24), i * 20, dtype=torch.uint8)
        (write_jpeg if suffix == "jpg" else write_png)(frame, str(tmp_path / f"img_{i}.{suffix}"))
    (tmp_path / "notes.txt").write_text("no frame")
    video = cmaev.Video(tmp_path)
    assert len(video) == 12
    assert video.read([11, 2, 2]).float().mean(dim=(1, 2, 3)).tolist() == [220, 40, 40]


def test_lists_and_class_folders(tmp_path):
    for name in ("b/one two.mp4", "b/x,y.mkv", "a/three.webm", "a/notes.txt", "a/take 7/img_1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    videos = tmp_path / "list.txt"
    videos.write_text(f"b/one two.mp4 3\n\nb/one two.mp4,4\nb/one two.mp4\n{tmp_path}/b/x,y.mkv 5\na/take 7 12 6\n"
                      "a/take 7 8\nb/one two.mp4 -1\n")
    two, comma, take = (str(tmp_path / name) for name in ("b/one two.mp4", "b/x,y.mkv", "a/take 7"))
    assert cmaev.read_list(videos) == [(two, 3), (two, 4), (two, None), (comma, 5), (take, 6), (take, 8), (two, -1)]
    assert cmaev.read_list(tmp_path) == [(take, 0), (str(tmp_path / "a/three.webm"), 0), (two, 1), (comma, 1)]


def touch(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    return root


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_line_that_is_a_path_has_no_label(tmp_path, encoding):
    touch(tmp_path, "clip 2/1.jpg", "clip/1.jpg", "b.mp4", "\u00e9 3.mp4", "c,4.mp4")
    text = "clip 2\r\nclip 2 7\r\nb.mp4\t5\r\n\u00e9 3.mp4\r\nc,4.mp4\r\nclip 30 1\r\n"
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    expected = [("clip 2", None), ("clip 2", 7), ("b.mp4", 5), ("\u00e9 3.mp4", None), ("c,4.mp4", None), ("clip", 1)]
    assert cmaev.read_list(tmp_path / "list.csv") == [(str(tmp_path / name), label) for name, label in expected]


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path / "d", b"a/caf\xe9.mp4", "b/x.mp4")
    (tmp_path / "list.txt").write_bytes(b"d/a/caf\xe9.mp4 0\n")
    (path, label), = cmaev.read_list(tmp_path / "list.txt")
    assert os.fsencode(path).endswith(b"caf\xe9.mp4") and label == 0 and cmaev.read_list(tmp_path / "d")[0] == (path, 0)
    shutil.copy(write(tmp_path / "v.mp4", frames=5), os.fsencode(path))
    assert len(cmaev.Video(path)) == 5
    finetune.report(torch.tensor([[0.7, 0.3]]), [(path, 0)], ["a", "b"], tmp_path)
    assert b"caf\xe9.mp4,a,a,0.7000" in (tmp_path / "predictions.csv").read_bytes()


def test_folders_as_people_have_them(tmp_path, capsys):
    """Hidden entries are neither classes nor videos, sub-folders count, the root's own videos have no label."""
    touch(tmp_path, *"""a/1.mp4 a/part/2.GIF a/._1.mp4 a/.thumbs/1.jpg a/take/1.png a/take/Thumbs.db b/1.mts b/2.M2TS
        b/3.vob b/4.mxf b/notes.txt c/poster.jpg c/1.mp4 empty/readme.md @eaDir/x.mp4 __MACOSX/a/1.mp4
        .ipynb_checkpoints/1.mp4 .x/1.mp4 flat.webm""".split())
    read = [(os.path.relpath(path, tmp_path), label) for path, label in cmaev.read_list(tmp_path)]
    assert read == [("a/1.mp4", 0), ("a/part/2.GIF", 0), ("a/take", 0), ("b/1.mts", 1), ("b/2.M2TS", 1), ("b/3.vob", 1),
                    ("b/4.mxf", 1), ("c/1.mp4", 2), ("flat.webm", None)]
    assert "3 files are not videos and are left out, for example" in capsys.readouterr().out
    names = finetune.class_names([video for video in cmaev.read_list(tmp_path) if video[1] is not None], tmp_path)
    assert names == ["a", "b", "c"]


def test_a_long_list_is_read_as_fast_as_a_plain_loop_but_for_a_factor(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, *(f"v{i:05d}.mp4" for i in range(20_000))))
    Path("l.txt").write_text("".join(f"v{i:05d}.mp4 {i % 400}\n" for i in range(20_000)))

    def plain_loop():
        names = set(os.listdir())
        return [(name, int(label)) for name, label in (line.rsplit(None, 1) for line in open("l.txt")) if name in names]

    def fastest(read):
        times = []
        for _ in range(3):
            began = time.process_time()
            videos = read()
            times.append(time.process_time() - began)
        return videos, min(times)
    (videos, took), (expected, plain) = fastest(lambda: cmaev.read_list("l.txt")), fastest(plain_loop)
    assert videos == expected and took < 12 * plain


@pytest.fixture
def fruit(tmp_path):
    """Training folders of three classes, and test videos of two, apple and cherry."""
    return touch(tmp_path, *(f"train/{c}/{i}.mp4" for c in ("apple", "banana", "cherry") for i in range(25)),
                 *(f"val/{c}/{i}.mp4" for c in ("apple", "cherry") for i in range(2)))


def test_test_folders_are_matched_by_name(fruit):
    train = finetune.read_labelled(fruit / "train", "data")
    names = finetune.class_names(train, fruit / "train")
    tests = finetune.read_test_videos(fruit / "val", names, True)
    assert names == ["apple", "banana", "cherry"] and [label for _, label in tests] == [0, 0, 2, 2]
    touch(fruit, "val/durian/1.mp4")
    with pytest.raises(cmaev.CMAEVError, match="class folders durian are none .* apple, banana, cherry"):
        finetune.read_test_videos(fruit / "val", names, True)
    wrong, right = fruit / "wrong.txt", fruit / "right.txt"
    wrong.write_text("val/apple/0.mp4 0\nval/cherry/0.mp4 1\n")
    right.write_text("val/apple/0.mp4 0\nval/cherry/0.mp4 2\n")
    assert [label for _, label in finetune.read_test_videos(right, names, True)] == [0, 2]
    with pytest.raises(cmaev.CMAEVError, match="cherry/0.mp4 has label 1, which is banana in .* folder is cherry"):
        finetune.read_test_videos(wrong, names, True)
    assert len(finetune.read_test_videos(wrong, names, False)) == 2  # two lists: the labels count
    above = touch(fruit / "banana", "flat/0.mp4") / "list.txt"  # a folder above the list says nothing of its videos
    above.write_text("flat/0.mp4 0\n")
    assert [label for _, label in finetune.read_test_videos(above, names, True)] == [0]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    touch(tmp_path, "a/1.mp4")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert cmaev.read_list(tmp_path) == [(str(tmp_path / "a/1.mp4"), 0)]


def test_eval_uses_the_videos_that_the_run_held_out(demo, capsys):
    """Also when the list has grown since, and under another seed: none of them was trained on."""
    folder, lines = demo.parent, (demo / "train.txt").read_text().splitlines()
    grown, run = folder / "grown.txt", folder / "held-out"
    grown.write_text("".join(f"{demo}/{line}\n" for line in lines))
    command = [*TUNE, "--data", grown, "--init", "none", "--out", run, "--epochs", 1, "--warmup-epochs", 0]
    assert run_finetune(*command) is None
    tested = lambda path: [row.split(",")[0] for row in path.read_text().splitlines()[1:]]
    grown.write_text(grown.read_text() + f"{demo}/{(demo / 'val.txt').read_text().splitlines()[0]}\n")
    assert run_finetune("--eval", "--seed", 1, "--out", run, "--workers", 0) is None
    assert tested(run / "eval" / "predictions.csv") == tested(run / "predictions.csv")


def test_a_tenth_of_each_class_is_held_out(fruit):
    videos = finetune.read_labelled(fruit / "train", "data") + [("one.mp4", 3)]
    train, tests = finetune.hold_out(videos, 0)
    assert sorted(train + tests) == sorted(videos) and ("one.mp4", 3) in train
    assert [label for _, label in tests] == [0, 0, 1, 1, 2, 2] and finetune.hold_out(videos, 0)[1] == tests
    assert finetune.hold_out(videos, 1)[1] != tests


# The sampler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames, frames, rate, max_shift", [
    (100, 16, 4, 8), (66, 16, 4, 8), (61, 16, 4, 8), (40, 16, 4, 8), (1, 16, 4, 0), (35, 16, 2, 4), (20, 4, 1, 16)])
def test_temporal_shift_indices(num_frames, frames, rate, max_shift):
    """The drawn (t1, delta) are exactly the possible ones, and the indices follow from them by the paper's formula."""
    possible, drawn, generator = {}, {}, torch.Generator().manual_seed(0)
    for delta in range(max_shift + 1):
        starts = [t for t in range(num_frames) if t + (frames - 1) * rate + delta < num_frames] or [0]
        for t in starts:
            views = [tuple(min(t + shift + i * rate, num_frames - 1) for i in range(frames)) for shift in (0, delta)]
            possible[tuple(views)] = possible.get(tuple(views), 0) + 1 / (max_shift + 1) / len(starts)
    draws = 40 * len(possible) + 2000
    for _ in range(draws):
        views = cmaev.temporal_shift_indices(num_frames, frames, rate, max_shift, generator)
        views = tuple(tuple(view.tolist()) for view in views)
        drawn[views] = drawn.get(views, 0) + 1
    assert drawn.keys() == possible.keys()
    chi2 = sum((drawn[v] - draws * p) ** 2 / (draws * p) for v, p in possible.items())
    assert chi2 < len(possible) + 5 * math.sqrt(2 * len(possible)) + 5  # five standard deviations over its mean


def test_multi_scale_crop():
    drawn, generator = set(), torch.Generator().manual_seed(0)
    for _ in range(4000):
        drawn.add(cmaev.multi_scale_crop(100, 160, generator))
    sides = {100: 0, 87: 1, 75: 2, 66: 3}
    assert {(h, w) for _, _, h, w in drawn} == {(h, w) for h in sides for w in sides if abs(sides[h] - sides[w]) < 2}
    for h, w in {(h, w) for _, _, h, w in drawn}:
        places = {(y, x) for y, x, *size in drawn if size == [h, w]}
        y, x = (100 - h) / 4, (160 - w) / 4
        quarters = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2),  # corners, centre, edge middles, quarter points
                    (0, 2), (2, 0), (2, 4), (4, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
        assert places == {(int(a * y), int(b * x)) for a, b in quarters}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo"
    cmaev.make_demo(folder, train=40, val=10)
    return folder


def clips_of(demo, **changes):
    settings = dict(frames=4, rate=2, max_shift=4, size=32, mask_ratio=0.75, seed=3) | changes
    return cmaev.PretrainClips(cmaev.read_list(demo / "train.txt"), (2, 4, 4), **settings)


def test_sample_against_a_plain_decode(demo):
    """A sample's views are a resized crop of the frames it names."""
    clips = clips_of(demo, repeats=3)
    sample, epoch, index = clips[5, 7], 5, 7
    frames = plain_decode(clips.videos[index][0])
    with cmaev.seeded(3, epoch, index) as generator:
        indices = [cmaev.temporal_shift_indices(48, 4, 2, 4, generator) for _ in range(3)]
        crops = [cmaev.multi_scale_crop(80, 80, generator) for _ in range(3)]
    for r, (views, (top, left, h, w)) in enumerate(zip(indices, crops)):
        for view, name in zip(views, ("online", "target")):
            cropped = torch.from_numpy(frames[view][:, top:top + h, left:left + w]).permute(0, 3, 1, 2).float()
            expected = F.interpolate(cropped, (32, 32), mode="bilinear", antialias=True)
            assert (sample[name][r].float() - expected).abs().max() <= 1  # uint8 rounding
    assert len({tuple(view.tolist()) for views in indices for view in views}) > 3  # clips differ, views are shifted
    assert sample["mask"].shape == (3, 32) and (sample["mask"].sum(dim=1) == 24).all()


def torchvision_colors(clip, brightness, contrast, saturation, hue, sigma):
    """The same factors by torchvision's functions, one after the other; float [T, 3, S, S] in 0 to 255."""
    f, clip = cmaev.v2.functional, clip / 255
    for operation, factor in ((f.adjust_brightness, brightness), (f.adjust_contrast, contrast),
                              (f.adjust_saturation, saturation), (f.adjust_hue, hue)):
        clip = operation(clip, factor)
    return 255 * f.gaussian_blur(clip, [13, 13], [sigma, sigma])


def our_colors(clips, *factors):
    colors = cmaev.color_parameters(*(torch.tensor(float(factor)) for factor in factors))
    return cmaev.augment_colors(clips, colors.expand(len(clips), -1))


@pytest.mark.parametrize("factors, tolerance", [
    ((1.3, 1, 1, 0, 0.01), 0.1), ((1, 0.7, 1, 0, 0.01), 0.2), ((1, 1.3, 1, 0, 0.01), 0.2), ((1, 1, 0.6, 0, 0.01), 0.2),
    ((1, 1, 0, 0, 0.01), 0.2), ((1, 1, 1, 0, 1.7), 0.1), ((1.2, 0.8, 0.7, 0, 0.5), 0.3), ((1, 1, 1, 0.05, 0.01), 8)])
def test_each_color_factor_is_torchvisions(factors, tolerance):
    """On frames alike and without clamping; a turn of the IQ plane is near a turn of the hue alone."""
    clips = torch.randint(90, 150, (2, 1, 3, 32, 32), dtype=torch.uint8).expand(-1, 4, -1, -1, -1)
    inside = slice(6, -6)  # at the edges torchvision's blur mirrors
    for ours, clip in zip(our_colors(clips, *factors), clips):
        difference = (ours - torchvision_colors(clip.float(), *factors))[..., inside, inside].abs()
        assert ours.dtype == torch.float32 and (difference.mean() if factors[3] else difference.max()) < tolerance


def test_colors_are_near_torchvisions_on_frames(demo):
    clips = torch.stack([clips_of(demo)[0, i]["target"][0] for i in range(20)])
    generator, away, moved = torch.Generator().manual_seed(0), [], []
    for clip in clips:
        *factors, hue = 2 * torch.rand(4, generator=generator) - 1
        factors = [*(1 + 0.4 * float(factor) for factor in factors), 0.1 * float(hue), 0.01]
        ours, = our_colors(clip[None], *factors)
        theirs = torchvision_colors(clip.float(), *factors)
        away.append((ours - theirs).abs().mean())
        moved.append((theirs - clip).abs().mean())
        other = our_colors(clip[None], *factors[:3], -factors[3], 0.01)[0]  # the hue turned the other way
        assert abs(factors[3]) < 0.02 or (ours - theirs).abs().mean() < (other - theirs).abs().mean()
    assert np.mean(away) < 0.35 * np.mean(moved)


def test_draws_of_colors(monkeypatch):
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with p .8, grey with p .2, blur of sigma .1 to 2 with p .5."""
    monkeypatch.setattr(cmaev, "color_parameters", lambda *factors: torch.stack(factors))
    with cmaev.seeded(4):
        draws = torch.stack([cmaev.draw_colors() for _ in range(4000)])
    brightness, contrast, saturation, hue, sigma = draws.unbind(1)
    grey, jittered, blurred = saturation == 0, brightness != 1, sigma != 0.01
    assert torch.stack([jittered, grey, blurred]).float().mean(dim=1).tolist() == pytest.approx([0.8, 0.2, 0.5], abs=0.03)
    for drawn, low, high in ((brightness[jittered], 0.6, 1.4), (contrast[jittered], 0.6, 1.4), (hue[jittered], -0.1, 0.1),
                             (saturation[jittered & ~grey], 0.6, 1.4), (sigma[blurred], 0.1, 2)):
        assert [drawn.min(), drawn.mean(), drawn.max()] == pytest.approx([low, (low + high) / 2, high], abs=0.03 * (high - low))


def test_colors_are_drawn_for_each_clip_and_are_the_same_for_its_frames(demo):
    draws = torch.cat([clips_of(demo, repeats=10)[i, 0]["colors"] for i in range(2)])
    assert draws.shape == (20, 11) and len({str(draw) for draw in draws.tolist()}) > 15  # some change nothing
    clips = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8).expand(20, 4, -1, -1, -1)
    colored = cmaev.augment_colors(clips, draws)
    assert (colored == colored[:, :1]).all()
    torch.testing.assert_close(cmaev.augment_colors(clips[5:7], draws[5:7]), colored[5:7])  # whatever is beside it


def test_colors_compile_into_one_graph():
    compiled = torch.compile(cmaev.augment_colors, fullgraph=True, backend="eager")
    clips, colors = torch.randint(0, 256, (5, 2, 3, 16, 16), dtype=torch.uint8), cmaev.draw_colors().expand(5, -1)
    assert torch.equal(compiled(clips, colors), cmaev.augment_colors(clips, colors))


def test_samples_do_not_depend_on_workers_ranks_or_restarts(demo):
    clips, before = clips_of(demo, repeats=2), torch.get_rng_state()
    clips[0, 0]
    assert torch.equal(torch.get_rng_state(), before)

    def load(workers, rank=0, world=1, start=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cmaev, "this_rank", lambda: rank)
            patch.setattr(cmaev, "world_size", lambda: world)
            return list(DataLoader(clips, batch_sampler=list(cmaev.batches(40, 8, 7, 0, start)), num_workers=workers))
    whole = load(0)
    for batch, again in zip(whole, load(2), strict=True):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    for batch, *halves in zip(whole, load(0, rank=0, world=2), load(0, rank=1, world=2), strict=True):
        assert all(torch.equal(batch[name], torch.cat([half[name] for half in halves])) for name in batch)
    for batch, rest in zip(whole[3:], load(0, start=3), strict=True):
        assert all(torch.equal(batch[name], rest[name]) for name in batch)
    keys = list(cmaev.batches(40, 8, 10, 0))
    first, second = sum(keys[:5], []), sum(keys[5:], [])
    assert sorted(first) == [(0, i) for i in range(40)] and sorted(second) == [(1, i) for i in range(40)]
    assert [i for _, i in first] != [i for _, i in second]


def test_without_target_the_online_view_is_the_same(demo):
    both, one = clips_of(demo)[2, 3], clips_of(demo, two_views=False)[2, 3]
    assert one.keys() == {"online", "mask", "replaced"}
    assert all(torch.equal(both[name], one[name]) for name in ("online", "mask"))


# ---------------------------------------------------------------------------------------------------------------------
# 2  Tube mask
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, masked", [(0.9, 176), (0.75, 147), (0.5, 98), (0.95, 186)])
def test_tube_mask(ratio, masked):
    mask = cmaev.tube_mask(500, (8, 14, 14), ratio, torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool and mask.shape == (500, 1568)
    tubes = mask.view(500, 8, 196)
    assert (tubes == tubes[:, :1]).all()
    assert (tubes.sum(dim=2) == masked).all()
    share = tubes[:, 0].float().mean(dim=0)  # each position as often as any other: five standard deviations
    assert (share - masked / 196).abs().max() < 5 * math.sqrt(masked / 196 * (1 - masked / 196) / 500)


def test_visible_and_masked_indices():
    mask = cmaev.tube_mask(3, (2, 3, 4), 0.5, torch.Generator().manual_seed(0))
    visible, masked = cmaev.visible_and_masked(mask)
    tokens = torch.arange(3 * 24 * 5.).view(3, 24, 5)
    for b in range(3):
        assert visible[b].tolist() == [n for n in range(24) if not mask[b, n]]
        assert masked[b].tolist() == [n for n in range(24) if mask[b, n]]
        assert torch.equal(cmaev.gather_tokens(tokens, masked)[b], tokens[b][mask[b]])


# ---------------------------------------------------------------------------------------------------------------------
# 3  Encoders
# ---------------------------------------------------------------------------------------------------------------------

SMALL = dict(frames=4, size=(32, 48), tubelet=2, patch=16)


def small(name, **changes):
    sizes = dict(vit=dict(width=24, depth=2, heads=2), convvit=dict(widths=(8, 12, 24), depths=(2, 1, 2), heads=2))
    torch.manual_seed(0)
    model = dict(vit=cmaev.VisionTransformer, convvit=cmaev.ConvViT)[name](**sizes[name], **SMALL | changes)
    for p in model.parameters():  # no zero biases: they would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    return model


def test_sincos_table():
    table = cmaev.sincos_table(50, 12)
    for n in range(50):
        for j in range(12):
            angle = n / 10000 ** (2 * (j // 2) / 12)
            assert abs(float(table[0, n, j]) - (math.cos(angle) if j % 2 else math.sin(angle))) < 1e-6


def test_cubes_against_a_loop():
    clip, grid = torch.randn(2, 3, 4, 32, 48), (2, 2, 3)
    x = cmaev.cubes(clip, grid)
    for n, (t, i, j) in enumerate(np.ndindex(grid)):
        cube = clip[:, :, 2 * t:2 * t + 2, 16 * i:16 * i + 16, 16 * j:16 * j + 16]
        assert torch.equal(x[:, n].view(2, 2, 16, 16, 3), cube.permute(0, 2, 3, 4, 1))
    assert torch.equal(cmaev.uncubes(x, grid, (4, 32, 48)), clip)


def test_cube_embedding_is_the_convolution():
    encoder, clip = small("vit"), torch.randn(2, 3, 4, 32, 48)
    expected = encoder.patch_embed.proj(clip).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(cmaev.cubes(clip, encoder.grid)), expected)


def dense_convvit(model, clip, mask):
    """ConvMAE as published, in 3-D: whole maps [B, C, T, H, W], masked positions set to zero before a convolution."""
    t, p, _ = model.cube
    maps = lambda x, s: x.view(len(x), 1, *model.grid).repeat_interleave(s, 3).repeat_interleave(s, 4)
    keep, last = ~mask, lambda f, x: f(x.movedim(1, -1)).movedim(-1, 1)
    fold = lambda linear, s: linear.weight.unflatten(1, (1, s, s, -1)).movedim(-1, 1)

    def stage(x, blocks, keep):
        for block in blocks:
            y = F.conv3d(keep * last(block.conv1, last(block.norm1, x)), block.depthwise.weight, block.depthwise.bias,
                         padding=2, groups=x.shape[1])
            x = x + last(block.conv2, y)
            x = x + last(block.mlp, last(block.norm2, x))
        return x

    x = F.conv3d(clip, model.patch_embed1.proj.weight, model.patch_embed1.proj.bias, stride=(t, p // 4, p // 4))
    one = stage(F.gelu(last(model.embed_norms[0], x)), model.blocks1, maps(keep, 4))
    x = F.conv3d(one, fold(model.patch_embed2, 2), model.patch_embed2.bias, stride=(1, 2, 2))
    two = stage(F.gelu(last(model.embed_norms[1], x)), model.blocks2, maps(keep, 2))
    x = F.conv3d(two, fold(model.patch_embed3, 2), model.patch_embed3.bias, stride=(1, 2, 2))
    x = F.gelu(last(model.embed_norms[2], x)).flatten(2).transpose(1, 2)
    tokens = lambda x: x[keep].view(len(x), -1, x.shape[-1])
    x = tokens(model.patch_embed4(x) + model.positions)
    for block in model.blocks3:
        x = block(x)
    for stage_out, fusion, s in ((one, model.fusion1, 4), (two, model.fusion2, 2)):
        x = x + tokens(F.conv3d(stage_out, fold(fusion, s), fusion.bias, stride=(1, s, s)).flatten(2).transpose(1, 2))
    return model.norm(x)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("frames", [2, 4, 6, 12])  # one time step; fewer and more than a kernel reaches
def test_convvit_on_visible_tokens_equals_the_dense_masked_computation(frames, masked):
    model, clip = small("convvit", frames=frames), torch.randn(2, 3, frames, 32, 48)
    mask = cmaev.tube_mask(2, model.grid, 0.5) if masked else torch.zeros(2, 3 * frames, dtype=torch.bool)
    outputs = model(clip, mask if masked else None), dense_convvit(model, clip, mask)
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(output.square().sum(), list(model.parameters())) for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_initialisation_and_epsilons_of_convvit():
    """Convolutions are uniform within 1 / sqrt(inputs), Linear layers within sqrt(6 / (inputs + outputs))."""
    model = cmaev.build_encoder("convvit_tiny", frames=4, size=32)
    linear = ("patch_embed3", "patch_embed4", "blocks3")
    for name, p in model.named_parameters():
        if p.ndim > 1:
            inputs, outputs = p[0].numel(), len(p)
            bound = math.sqrt(6 / (inputs + outputs)) if name.startswith(linear) else 1 / math.sqrt(inputs)
            assert 0.9 * bound < p.abs().max() <= bound, name
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-5 if name.startswith(("blocks1", "blocks2", "embed_norms")) else 1e-6), name


def test_convvit_without_fusion():
    model = cmaev.CMAEV("convvit_test", fusion=False, **TINY)
    assert not any("fusion" in name for name in model.state_dict())


def test_convvit_needs_tubes():
    model, mask = small("convvit"), torch.arange(12).expand(1, -1) % 5 < 2
    with pytest.raises(cmaev.CMAEVError, match="masked at every time step"):
        model(torch.randn(1, 3, 4, 32, 48), mask)


@pytest.mark.parametrize("name", ["vit", "convvit"])
def test_masked_pixels_reach_no_visible_token(name):
    model, clip = small(name), torch.randn(2, 3, 4, 32, 48)
    mask = cmaev.tube_mask(2, model.grid, 0.5)
    noise = cmaev.uncubes(mask[..., None] * torch.randn(2, 12, 1536), model.grid, (4, 32, 48))
    tokens = model(clip, mask)
    assert tokens.shape == (2, 6, 24)
    assert torch.equal(tokens, model(clip + 9 * noise, mask))
    visible = cmaev.uncubes(~mask[..., None] * torch.randn(2, 12, 1536), model.grid, (4, 32, 48))
    assert not torch.equal(tokens, model(clip + visible, mask))


@pytest.mark.parametrize("name, millions", [("vit_base", 87), ("convvit_base", 85)])
def test_parameters_of_table_1(name, millions):
    sizes = dict(fusion=False) if name == "convvit_base" else {}
    model = finetune.Classifier(cmaev.build_encoder(name, **sizes), 400)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


# ---------------------------------------------------------------------------------------------------------------------
# 4 and 5  Decoder, heads, losses
# ---------------------------------------------------------------------------------------------------------------------


def test_decoder_predicts_the_masked_tokens_in_order():
    """Swapping two masked positions in the table swaps their predictions; the visible tokens' order does not matter."""
    encoder = small("vit", frames=4)
    encoder.width = 128
    decoder = cmaev.PixelDecoder(encoder, depth=1)
    mask = cmaev.tube_mask(1, encoder.grid, 0.5)
    tokens, (visible, masked) = torch.randn(1, 6, 128), cmaev.visible_and_masked(mask)
    before = decoder(tokens, visible, masked)
    assert before.shape == (1, 6, 1536)
    a, b = masked[0, 1], masked[0, 4]
    decoder.positions[:, [a, b]] = decoder.positions[:, [b, a]].clone()
    torch.testing.assert_close(decoder(tokens, visible, masked), before[:, [0, 4, 2, 3, 1, 5]])


def test_reconstruction_target_against_a_loop():
    """VideoMAE's target in float64, value by value: per cube and channel, unbiased, epsilon outside the root."""
    clip, grid = torch.rand(2, 3, 4, 32, 48, dtype=torch.float64), (2, 2, 3)
    clip[0, 0, :2] = 0.485 + 1e-6 * clip[0, 0, :2]  # so flat that the epsilon matters
    mask, total, count = cmaev.tube_mask(2, grid, 0.5), 0.0, 0
    prediction = torch.randn(2, 6, 1536, dtype=torch.float64)
    for b in range(2):
        for m, n in enumerate(np.flatnonzero(mask[b])):
            t, i, j = np.unravel_index(n, grid)
            for c in range(3):
                cube = clip[b, c, 2 * t:2 * t + 2, 16 * i:16 * i + 16, 16 * j:16 * j + 16].reshape(-1).tolist()
                mean = sum(cube) / 512
                std = math.sqrt(sum((v - mean) ** 2 for v in cube) / 511)
                for k, v in enumerate(cube):
                    total += (float(prediction[b, m, 3 * k + c]) - (v - mean) / (std + 1e-6)) ** 2
                    count += 1
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    masked = cmaev.visible_and_masked(mask)[1]
    loss = cmaev.reconstruction_loss(prediction.float(), ((clip - mean) / std).float(), masked, grid)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_info_nce_against_a_loop():
    query, key, tau = torch.randn(7, 5).double(), torch.randn(7, 5).double(), 0.07
    total, right = 0.0, 0
    for i in range(7):
        rho = [float(query[i] @ k / math.sqrt(query[i] @ query[i]) / math.sqrt(k @ k)) for k in key]
        total -= math.log(math.exp(rho[i] / tau) / sum(math.exp(r / tau) for r in rho))
        right += max(range(7), key=lambda j: rho[j]) == i
    loss, accuracy = cmaev.info_nce(query, key, tau)
    assert float(loss) == pytest.approx(total / 7, rel=1e-5)
    assert float(accuracy) == pytest.approx(right / 7)


def test_losses_are_float32_under_amp():
    query, key, tokens = torch.randn(7, 64), torch.randn(7, 64), torch.randn(2, 6, 1536)
    clip, mask, grid = torch.randn(2, 3, 4, 32, 48), cmaev.tube_mask(2, (2, 2, 3), 0.5), (2, 2, 3)
    masked = cmaev.visible_and_masked(mask)[1]
    both = lambda: (*cmaev.info_nce(query, key, 0.07), cmaev.reconstruction_loss(tokens, clip, masked, grid))
    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert both() == expected


@pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
def test_gradients_under_amp_are_those_of_float32(encoder):
    """Each parameter's on its own: oneDNN's bf16 gradient of a depthwise convolution was wrong by 100 %."""
    grads = []
    for amp in (False, True):
        model, (online, _, mask) = tiny(encoder, contrast_weight=0)  # a batch norm over six clips magnifies rounding
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(online, None, mask)["loss"]
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    scale = max(float(grad.norm()) for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < 0.1 * grad.norm() + 0.003 * scale, name


def test_batch_norm_equals_torch():
    ours, x = cmaev.GlobalBatchNorm(6), torch.randn(9, 6) * 3 + 2
    torch.testing.assert_close(ours(x), F.batch_norm(x, None, None, training=True))


def test_normalize_and_back():
    clips = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    x = cmaev.normalize(clips)
    assert x.shape == (2, 3, 4, 8, 8)
    assert float(x[1, 2, 3, 4, 5]) == pytest.approx((int(clips[1, 3, 2, 4, 5]) / 255 - 0.406) / 0.225, abs=1e-5)
    torch.testing.assert_close(cmaev.to_unit_range(x), clips.transpose(1, 2) / 255)


# ---------------------------------------------------------------------------------------------------------------------
# 6  CMAE-V
# ---------------------------------------------------------------------------------------------------------------------

TINY = dict(frames=4, size=32, tubelet=2, patch=8)
cmaev.ENCODERS["vit_test"] = cmaev.VisionTransformer, dict(width=64, depth=2, heads=2)
cmaev.ENCODERS["convvit_test"] = cmaev.ConvViT, dict(widths=(16, 32, 64), depths=(1, 1, 1), heads=2, fusion=True)


def tiny(encoder="vit_test", batch=6, **settings):
    torch.manual_seed(0)
    model = cmaev.CMAEV(encoder, **settings, **TINY)
    online = F.interpolate(torch.randn(batch, 3, 4, 8, 8), (4, 32, 32), mode="trilinear")
    return model, (online, online + 0.3 * torch.randn(batch, 3, 4, 32, 32), cmaev.tube_mask(batch, (2, 4, 4), 0.75))


def test_calls_that_cannot_work_say_what_is_expected(demo):
    model, (online, target, mask) = tiny()
    for call, words in {
            lambda: model(online, None, mask): "needs a target clip and",
            lambda: model(online[:1], target[:1], mask[:1]): "two or more clips",
            lambda: model(online, target, mask[:, 1:]): "bool [B, N]",
            lambda: model(online, target, mask.float()): "bool [B, N]",
            lambda: model.encoder(online[0]): "clip [B, 3, T,",
            lambda: clips_of(demo)[0]: "[epoch, index]",
            lambda: labelled(demo)[0]: "[epoch, index]", lambda: clips_of(demo, mask_ratio=1.0): "mask ratio 1.0",
            lambda: cmaev.temporal_shift_indices(0, 16, 4, 8): "num_frames 0"}.items():
        with pytest.raises(cmaev.CMAEVError, match=re.escape(words)) as raised:
            call()
        assert not isinstance(raised.value, cmaev.BadVideo)


def test_loss_is_equation_8():
    model, batch = tiny(contrast_weight=0.5)
    losses = model(*batch)
    assert losses["loss"].item() == pytest.approx((losses["reconstruction"] + 0.5 * losses["contrast"]).item())
    alone, _ = tiny(contrast_weight=0.0)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k in alone.state_dict()})
    losses_alone = alone(batch[0], None, batch[2])
    assert losses_alone["loss"] == losses_alone["reconstruction"] == losses["reconstruction"]
    assert not any("target" in name or "project" in name for name in alone.state_dict())


@pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
def test_gradient_reaches_all_but_the_target(encoder):
    model, batch = tiny(encoder)
    batch[1].requires_grad_()
    model(*batch)["loss"].backward()
    assert batch[1].grad is None
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("target"), name


def test_momentum_step():
    model, _ = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(before[f"target_{n}"], before[n]) for n in before if f"target_{n}" in before)  # a copy
    for p in model.parameters():
        p.data += torch.randn_like(p) * p.requires_grad
    model.update_target(0.9)
    moved = 0
    for name, p in model.named_parameters():
        if name.startswith("target_"):
            source = model.get_parameter(name.removeprefix("target_"))
            torch.testing.assert_close(p.data, 0.9 * before[name] + 0.1 * source.data)
            moved += not torch.equal(p, before[name])
    assert moved == len(list(model.target_encoder.parameters())) + len(list(model.target_projector.parameters()))


@pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
def test_overfits_one_batch(encoder):
    model, batch = tiny(encoder)
    optimizer = torch.optim.AdamW(cmaev.decay_groups(model, 0.05), lr=3e-3)
    first = model(*batch)
    for _ in range(200):
        losses = model(*batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(0.99)
    assert losses["reconstruction"] < 0.35 * first["reconstruction"]
    assert losses["contrast"] < 0.2 * first["contrast"] and losses["accuracy"] == 1


@pytest.mark.parametrize("encoder", ["vit_tiny", "convvit_tiny"])
def test_compiles_into_a_few_graphs_once(encoder):
    model, graphs, counts = cmaev.CMAEV(encoder, frames=4, size=32, patch=8), [], []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(3):
        batch = torch.randn(2, 3, 4, 32, 32), torch.randn(2, 3, 4, 32, 32), cmaev.tube_mask(2, (2, 4, 4), 0.75)
        losses = compiled(*batch)
        losses["loss"].backward()
        counts.append(len(graphs))
        torch.testing.assert_close(losses["loss"], model(*batch)["loss"])
    assert counts[0] <= 6 and counts == [counts[0]] * 3


def test_reconstruct_pastes_what_is_visible():
    model, (online, _, mask) = tiny()
    original, masked, means, filled = model.reconstruct(online, mask)
    hidden = cmaev.uncubes(mask[..., None].expand(-1, -1, 2 * 8 * 8 * 3), (2, 4, 4), (4, 32, 32))
    for row in (masked, means, filled):
        assert torch.equal(row[~hidden], original[~hidden])
    mean_color = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1).expand_as(masked)
    assert torch.equal(masked[hidden], mean_color[hidden]) and (filled[hidden] != original[hidden]).float().mean() > 0.5
    unclamped = cmaev.cubes(cmaev.to_unit_range(online), (2, 4, 4)).unflatten(-1, (-1, 3)).mean(dim=2)
    of_cubes = cmaev.cubes(means, (2, 4, 4)).unflatten(-1, (-1, 3))
    torch.testing.assert_close(of_cubes[mask], unclamped[mask].clamp(0, 1)[:, None].expand_as(of_cubes[mask]))


def test_decay_groups_and_schedule():
    model, _ = tiny()
    decayed, free = ({id(p) for p in group["params"]} for group in cmaev.decay_groups(model, 0.05))
    for name, p in model.named_parameters():
        one_number_a_channel = name.endswith(("bias", "mask_token", "or.1.weight")) or "norm" in name
        where = "neither" if name.startswith("target") else "free" if one_number_a_channel else "decayed"
        assert (id(p) in decayed, id(p) in free) == (where == "decayed", where == "free"), name
    rates = [cmaev.learning_rate(step, 10, 50, 0.1, 1.0, 0.2) for step in range(50)]
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.0, 10).tolist())
    assert rates[10:] == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)])


# ---------------------------------------------------------------------------------------------------------------------
# 9  Training: ranks, kills, folders, wrong input
# ---------------------------------------------------------------------------------------------------------------------

SHORT = ("--recipe demo --encoder vit_tiny --frames 4 --size 32 --patch 8 --mask-ratio 0.75 --batch-size 8 --epochs 4 "
         "--amp none --warmup-epochs 1 --log-every 4 --save-every 3 --picture-every 0").split()  # 20 steps, 40 videos


def run_pretrain(*arguments):
    """pretrain.py in this process -> what it ends with: None, or the line that it exits with."""
    if "--data" in arguments and "--recipe" not in arguments:
        arguments = "--recipe", "demo", *arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        try:
            cmaev.run_script(pretrain.main)
        except SystemExit as end:
            return str(end)


def log_of(run):
    keep = ("step", "loss", "reconstruction", "contrast", "accuracy", "lr", "grad_norm")
    return [{name: line[name] for name in keep} for line in map(json.loads, (run / "log.jsonl").open())]


@pytest.fixture(scope="module")
def undisturbed(demo):
    run = demo.parent / "undisturbed"
    assert run_pretrain(*SHORT, "--data", demo / "train.txt", "--out", run, "--workers", 0) is None
    return run


def test_killed_and_resumed_run_is_bit_equal(demo, undisturbed):
    """With other worker processes, too."""
    run = demo.parent / "killed"
    command = [*SHORT, "--data", str(demo / "train.txt"), "--out", str(run)]
    process = subprocess.Popen([sys.executable, HERE / "pretrain.py", *command, "--workers", "1"],
                               stdout=subprocess.DEVNULL)
    assert wait_for((run / "checkpoint.pt").exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 20
    assert run_pretrain(*command, "--workers", 2) is None
    assert log_of(run) == log_of(undisturbed)
    weights, expected = (torch.load(r / "checkpoint.pt", weights_only=True)["model"] for r in (run, undisturbed))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_held_out_reconstruction(demo, undisturbed, capsys):
    """Over seven videos in batches of four, against the loss of each video alone."""
    folder = demo.parent
    seven = folder / "seven.txt"
    videos = cmaev.read_list(demo / "val.txt")[:7]
    seven.write_text("".join(f"{path}\n" for path, _ in videos))
    command = [*SHORT, "--data", demo / "train.txt", "--out", folder / "measured", "--val", seven, "--epochs", 1,
               "--warmup-epochs", 0, "--save-every", 2, "--log-every", 1, "--contrast-weight", 0]
    for _ in range(2):  # the second time it only finds that all is done
        assert run_pretrain(*command, "--workers", 1) is None
    assert "is finished" in capsys.readouterr().out
    log = [line for line in cmaev.read_log(folder / "measured") if "held_out_reconstruction" in line]
    assert [line["step"] for line in log] == [2, 4, 5]
    model = cmaev.CMAEV("vit_tiny", contrast_weight=0, frames=4, size=32, patch=8)
    model.load_state_dict(torch.load(folder / "measured" / "checkpoint.pt", weights_only=True)["model"])
    clips, losses = cmaev.PretrainClips(videos, model.encoder.grid, frames=4, size=32, max_shift=4, mask_ratio=0.75), []
    for i in range(7):
        clip, mask = cmaev.normalize(clips[0, i]["online"]), clips[0, i]["mask"]
        losses.append(model(clip, None, mask)["loss"].item())
    assert log[-1]["held_out_reconstruction"] == pytest.approx(np.mean(losses), rel=1e-5)


def part_of(batch, rank, world):
    n = len(batch[0])
    return [x[rank * n // world:(rank + 1) * n // world] for x in batch]


def as_rank(folder):
    """What each of two torchrun processes does: a short run, then one backward pass of its half of a batch."""
    sys.argv = ["pretrain.py", *SHORT, "--data", f"{folder}/demo/train.txt", "--out", f"{folder}/two", "--workers", "1"]
    pretrain.main()
    rank = torch.distributed.get_rank()
    for encoder in ("vit_test", "convvit_test"):
        model, batch = tiny(encoder, batch=8)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        losses = parallel(*part_of(batch, rank, 2))
        losses["loss"].backward()
        means = {name: float(cmaev.sum_over_ranks(value.detach().clone())) / 2 for name, value in losses.items()}
        if rank == 0:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            torch.save((means, grads), f"{folder}/{encoder}.pt")
    model, batch = tiny(batch=8)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), cmaev.grad_scaler(None, torch.device("cpu"))
    steps = []
    for bad in (False, True, False):
        loss = parallel(*part_of(batch, rank, 2))["loss"] * (math.nan if bad and rank == 1 else 1)
        grad_norm = cmaev.optimizer_step(loss, model.parameters(), optimizer, scaler, None)
        steps.append((bool(grad_norm.isfinite()), model.decoder.head.weight.detach().clone()))
    torch.save(steps, f"{folder}/skipped-{rank}.pt")


def score_as_rank(folder):
    """What each of two or three processes does: test the fine-tuned model together."""
    world = os.environ["WORLD_SIZE"]
    sys.argv = ["finetune.py", *TUNE, "--eval", "--data", f"{folder}/demo/train.txt", "--val", f"{folder}/demo/val.txt",
                "--out", f"{folder}/tuned", "--workers", "0", "--batch-size", "12"]
    finetune.main()
    if torch.distributed.get_rank() == 0:
        shutil.copy(f"{folder}/tuned/eval/predictions.csv", f"{folder}/scored-{world}.csv")
    torch.distributed.destroy_process_group()


def launch(world, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
    subprocess.run([*command, folder], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def two_ranks(demo, tuned):
    return launch(2, demo.parent)


@pytest.fixture(scope="module")
def three_ranks(demo, tuned):
    return launch(3, demo.parent)


@pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
def test_two_ranks_give_the_gradient_of_the_whole_batch(two_ranks, encoder):
    means, grads = torch.load(two_ranks / f"{encoder}.pt", weights_only=True)
    model, batch = tiny(encoder, batch=8)
    losses = model(*batch)
    losses["loss"].backward()
    assert means == pytest.approx({name: value.item() for name, value in losses.items()}, rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6 * scale, msg=lambda m: f"{name}: {m}")


def test_two_ranks_train_as_one(two_ranks, undisturbed):
    same_but_for_rounding(two_ranks / "two", undisturbed)


def same_but_for_rounding(run, undisturbed):
    """Ranks add up in another order than one process, and DDP in another in the first step after a start."""
    for line, expected in zip(log_of(run), log_of(undisturbed), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)
    weights, expected = (torch.load(r / "checkpoint.pt", weights_only=True)["model"] for r in (run, undisturbed))
    no_effect = (".0.bias", "qkv.bias")  # before a batch norm, or of k: a gradient of rounding, which Adam scales up
    for name, value in expected.items():
        if not name.endswith(no_effect):
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=lambda m: f"{name}: {m}")


def test_demo_from_nothing_to_finished(tmp_path, monkeypatch, capsys):
    """`python pretrain.py` at its smallest: makes the videos, trains, leaves what it promises, knows its end."""
    make_demo = cmaev.make_demo
    monkeypatch.setattr(cmaev, "make_demo", lambda folder: make_demo(folder, train=20, val=10))
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", 2, "--warmup-epochs", 1, "--subset", 16, "--batch-size", 8, "--log-every", 1, "--repeats", 2]
    assert run_pretrain(*small) is None
    run = Path("runs/pretrain-demo")
    assert len(cmaev.read_list("data/demo/train.txt")) == 20 and len(cmaev.read_list("data/demo/val.txt")) == 10
    log = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert [line["step"] for line in log] == list(range(1, 9)) and log[-1]["epoch"] == 2
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert log[-1]["loss"] == pytest.approx(log[-1]["reconstruction"] + 0.14 * log[-1]["contrast"])
    settings = json.loads((run / "settings.json").read_text())
    assert settings["settings"]["lr"] == pretrain.RECIPES["demo"]["lr"] and settings["torch"] == torch.__version__
    assert cmaev.decode_image(str(run / "reconstruction-000008.png")).shape == (3, 2 + 12 * 50, 2 + 8 * 50)
    encoder = torch.load(run / "encoder.pt", weights_only=True)["model"]
    assert {"patch_embed.proj.weight", "blocks.5.attn.q_bias", "blocks.0.mlp.fc2.bias", "norm.weight"} < encoder.keys()
    output = capsys.readouterr().out
    assert "step 8/8" in output and "left" in output and "finished" in output
    assert run_pretrain(*small) is None
    assert "is finished" in capsys.readouterr().out
    end = run_pretrain(*small, "--lr", 1, "--encoder", "vit_small", "--workers", 0)
    assert f"lr {pretrain.RECIPES['demo']['lr']} -> 1.0" in end and "encoder vit_tiny -> vit_small" in end
    assert "workers" not in end


def test_feed_counts_the_waiting():
    def slow():
        for i in range(3):
            time.sleep(0.2)
            yield {"clip": torch.full((2, 3, 5), i), "mask": torch.zeros(2, 3, 4, dtype=torch.bool)}
    feed = cmaev.Feed(slow(), torch.device("cpu"))
    batches = [next(feed), next(feed)]
    assert [int(batch["clip"].max()) for batch in batches] == [0, 1]
    assert batches[0]["clip"].shape == (6, 5) and batches[0]["mask"].shape == (6, 4)
    assert feed.waited() == pytest.approx(0.4, abs=0.1) and feed.waited() == 0
    with pytest.raises(StopIteration):
        next(feed), next(feed)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    write(folder / "good.mp4", frames=3)
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame) + stream.encode(None))
    (folder / "text.mp4").write_text("no video")
    lists = {"empty": "\n", "gone": "good.mp4 0\nlost.mp4 1\n", "label": "good.mp4 0\ngood.mp4 jump\n",
             "audio": "audio.mp4 0\n", "text": "text.mp4 0\n", "good": "good.mp4 0\n" * 8}
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "nothing").mkdir()
    return folder


@pytest.mark.parametrize("arguments, words", [
    ("--data nowhere.txt", "nowhere.txt: no such list"),
    ("--data empty.txt", "empty.txt: no videos in it"),
    ("--data gone.txt", "gone.txt, line 2: lost.mp4 does not exist"),
    ("--data label.txt", "label.txt, line 2: label 'jump' is no integer"),
    ("--data audio.txt --batch-size 2 --repeats 2", "audio.mp4: has no video stream"),
    ("--data text.txt --batch-size 2 --repeats 2", "text.mp4: cannot be opened as a video"),
    ("--data good.txt --batch-size 4 --size 50", "50x50 pixels does not divide"),
    ("--data good.txt --batch-size 4 --frames 3", "3 frames of 48x48"),
    ("--data good.txt --batch-size 4 --mask-ratio 1", "--mask-ratio: 1: give a number in (0, 1)"),
    ("--data good.txt --batch-size 4 --encoder vgg", "no encoder 'vgg'"),
    ("--data good.txt --batch-size 4 --encoder convvit_tiny --size 60 --patch 6", "patch size 6"),
    ("--data good.txt --batch-size 4 --amp fp8", "--amp: invalid choice: 'fp8'"),
    ("--data good.txt --batch-size 16", "--batch-size 16"),
    ("--data good.txt --batch-size 5 --repeats 2", "a multiple"),
    ("--recipe k400", "needs --data"),
    ("--data good.mp4", "good.mp4: is no text"),
    ("--data nothing", "no videos in it"),
    ("--data good.txt --seed -1", "--seed: -1: give"),
    ("--data good.txt --batch-size 4 --out good.txt/run", "--out good.txt/run cannot be made"),
])
def test_wrong_input_ends_in_one_line(wrong, monkeypatch, arguments, words):
    monkeypatch.chdir(wrong)
    end = run_pretrain(*arguments.split())
    assert end.startswith("error: ") and words in end and "\n" not in end
    assert not Path("runs").exists()


def test_a_video_that_breaks_in_a_worker_ends_in_one_line(wrong, monkeypatch):
    monkeypatch.chdir(wrong)
    Path("late.txt").write_text("good.mp4 0\n" + "audio.mp4 0\n" * 7)
    end = run_pretrain("--data", "late.txt", "--batch-size", 4, "--workers", 1, "--out", "late")
    assert end.startswith("error: ten videos in a row cannot be read, the last one: audio.mp4: has no video")
    assert "\n" not in end


def test_openmp_threads_wait_passively():
    """Set before torch loads its OpenMP, unless the user has set it."""
    for given, expected in ({}, "passive"), (dict(OMP_WAIT_POLICY="active"), "active"):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        for script in ("cmaev", "pretrain", "finetune"):
            code = f"""import builtins, os, sys
load = builtins.__import__
def spy(name, *rest, **more):
    if name == "torch" and name not in sys.modules:
        print(os.environ.get("OMP_WAIT_POLICY"))
    return load(name, *rest, **more)
builtins.__import__ = spy
import {script}"""
            run = subprocess.run([sys.executable, "-c", code], env=env, cwd=HERE, capture_output=True, text=True)
            assert run.stdout.split()[0] == expected, script


def test_a_run_without_a_checkpoint_can_start_with_other_settings(demo):
    run = demo.parent / "died"
    command = [*SHORT, "--data", demo / "train.txt", "--out", run, "--workers", 0, "--epochs", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmaev, "optimizer_step", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
        with pytest.raises(MemoryError):
            run_pretrain(*command)
    assert (run / "settings.json").exists() and not (run / "checkpoint.pt").exists()
    assert run_pretrain(*command, "--batch-size", 4) is None
    end = run_pretrain(*command, "--batch-size", 4, "--epochs", 3)
    assert "epochs 2 -> 3" in end and "number of epochs needs a new run" in end and "\n" not in end


def test_the_first_step_is_logged(undisturbed):
    assert [line["step"] for line in log_of(undisturbed)] == [1, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_trainer_in_a_folder_is_refused(demo, workers):
    """Also right after a kill -9, when the decoding processes of the first may still live."""
    run = demo.parent / f"locked-{workers}"
    command = [*SHORT, "--data", demo / "train.txt", "--out", run, "--save-every", 1000]
    first = start("pretrain.py", *command, "--workers", workers, "--epochs", 400)
    assert wait_for(lambda: (run / "log.jsonl").exists() and cmaev.read_log(run), first)
    end = run_pretrain(*command, "--workers", 0)
    assert end == f"error: {run} is in use by another process: wait for its end, or give another --out"
    first.kill()
    first.wait()
    assert run_pretrain(*command, "--workers", 0) is None


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_start_methods_of_decoding_processes(demo, tmp_path, method):
    (tmp_path / "start.py").write_text(f"""if __name__ == "__main__":
        import multiprocessing, runpy, sys
        multiprocessing.set_start_method("{method}")
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")""")
    command = [*SHORT, "--data", demo / "train.txt", "--out", tmp_path / "run", "--workers", 1, "--epochs", 2]
    run = subprocess.run([sys.executable, tmp_path / "start.py", HERE / "pretrain.py", *map(str, command)],
                         env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0 and "finished" in run.stdout, run.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("unshare"), reason="wants root")
def test_small_shared_memory_is_one_line(demo, tmp_path):
    command = [*SHORT, "--data", demo / "train.txt", "--out", tmp_path / "run", "--workers", 1, "--size", 96]
    run = subprocess.run(["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "_",
                          sys.executable, HERE / "pretrain.py", *map(str, command)], capture_output=True, text=True)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("no mounts here")
    assert run.stderr.splitlines()[-1].startswith("error: the shared memory, /dev/shm, is too small"), run.stderr
    assert "Traceback" not in run.stderr


def test_checkpoint_of_another_model(undisturbed, demo):
    run = demo.parent / "other"
    run.mkdir()
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    state["model"]["encoder.norm.weight"] = torch.ones(7)
    torch.save(state, run / "checkpoint.pt")
    command = [*SHORT, "--data", demo / "train.txt", "--out", run]
    end = run_pretrain(*command)
    assert "checkpoint.pt" in end and "encoder.norm.weight is [7], not [192]" in end and "\n" not in end
    (run / "checkpoint.pt").write_bytes(b"no checkpoint")
    end = run_pretrain(*command)
    assert "checkpoint.pt cannot be read" in end and "\n" not in end


# ---------------------------------------------------------------------------------------------------------------------
# 10  Demo
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_classes_differ_in_motion_alone():
    """The same draw under every class: one middle frame, and around it the light moves as the class says."""
    middle, span, moves = cmaev.DEMO_FRAMES // 2, range(8, 41), {}
    for label, name in enumerate(cmaev.DEMO_CLASSES):
        video = np.stack(list(cmaev.demo_video(label, np.random.default_rng(3)))).astype(int)
        still = video[middle] if label == 0 else still
        assert np.array_equal(video[middle], still)
        lit = [np.argwhere(frame.sum(axis=-1) > 306) for frame in video]
        row, column = np.array([lit[t].mean(axis=0) for t in span]).T
        moves[name] = dict(right=column[-1] - column[0], down=row[-1] - row[0], rows=np.ptp(row),
                           columns=np.ptp(column),
                           turn=(column[:-1] * row[1:] - column[1:] * row[:-1]).sum() + column[-1] * row[0]
                           - column[0] * row[-1],  # twice the area that the path goes round, clockwise on a screen
                           growth=len(lit[span[-1]]) / len(lit[span[0]]))
    assert moves["right"]["right"] > 10 > -10 > moves["left"]["right"]
    assert moves["down"]["down"] > 10 > -10 > moves["up"]["down"]
    assert moves["clockwise"]["turn"] > 200 > -200 > moves["counterclockwise"]["turn"]
    assert moves["growing"]["growth"] > 2 > 0.5 > moves["shrinking"]["growth"]
    assert moves["swinging"]["columns"] > 10 > 5 > moves["swinging"]["rows"]
    assert moves["bobbing"]["rows"] > 10 > 5 > moves["bobbing"]["columns"]


def test_demo_is_a_pure_function(demo):
    for i in range(6):  # the same file from frames at hand as from frames that take their time
        frames = list(cmaev.demo_video(i, np.random.default_rng((0, 0, i))))
        cmaev.write_video(demo.parent / "again.mp4", frames)
        assert (demo.parent / "again.mp4").read_bytes() == Path(cmaev.read_list(demo / "train.txt")[i][0]).read_bytes()
    videos = cmaev.read_list(demo / "train.txt")
    assert [label for _, label in videos] == [i % 10 for i in range(40)]
    frames = np.stack(list(cmaev.demo_video(7, np.random.default_rng((0, 0, 17)))))
    decoded = cmaev.Video(videos[17][0]).read(range(48)).numpy()
    assert np.abs(decoded - frames.astype(float)).mean() < 12  # H.264's losses


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning: clips, classifier, weights, probes, the script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 10, 61, 62, 100])
def test_dense_and_uniform_indices_against_loops(num_frames):
    for start in (0, 0.25, 0.5, 1):
        first = max(num_frames - 61, 0) * start
        expected = [min(int(first + 0.5) + 4 * i, num_frames - 1) for i in range(16)]
        assert finetune.dense_indices(num_frames, 16, 4, start).tolist() == expected
    offsets = torch.rand(8, generator=torch.Generator().manual_seed(0))
    for i, index in enumerate(finetune.uniform_indices(num_frames, 8, offsets).tolist()):
        assert i * num_frames / 8 - 1 < index <= (i + 1) * num_frames / 8  # inside the segment, cut down to a frame
        assert index == int((i + float(offsets[i])) * num_frames / 8)


def labelled(demo, **changes):
    settings = dict(frames=4, rate=4, size=32, sampling="dense") | changes
    return finetune.LabelledClips(cmaev.read_list(demo / "train.txt"), **settings)


def test_repeated_sampling_opens_a_video_once(demo, monkeypatch):
    opened, video = [], cmaev.Video
    monkeypatch.setattr(cmaev, "Video", lambda path: (opened.append(path), video(path))[1])
    augment = finetune.training_augmentation(32, 0.5, flip=True, rand_augment=True, erasing=0.25)
    clips = labelled(demo, augment=augment, repeats=3)
    sample = clips[0, 5]
    assert len(opened) == 1 and sample["clip"].shape == (3, 4, 3, 32, 32) and sample["label"].tolist() == [5, 5, 5]
    assert not torch.equal(sample["clip"][0], sample["clip"][1])
    assert all(torch.equal(sample[name], clips[0, 5][name]) for name in sample)
    assert not torch.equal(sample["clip"], clips[1, 5]["clip"])


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_views_against_a_plain_decode(tmp_path, sampling):
    """A wide video: 2 clips over time x 3 crops from its left to its right edge."""
    path = write(tmp_path / "wide.mp4", size=(32, 80))
    frames = torch.from_numpy(plain_decode(path)).permute(0, 3, 1, 2)
    sample = finetune.LabelledClips([(path, 1)], 4, 4, 32, sampling, segments=2, crops=3)[0, 0]
    dense = [[0, 4, 8, 12], [47, 51, 55, 59]]
    uniform = [[int((i + u) * 15) for i in range(4)] for u in (0.25, 0.75)]
    expected = [frames[indices][..., left:left + 32] for indices in (dense if sampling == "dense" else uniform)
                for left in (0, 24, 48)]
    assert torch.equal(sample["clip"], torch.stack(expected))


def test_flips_only_where_the_recipe_says():
    assert [finetune.RECIPES[name].get("flip", True) for name in ("demo", "k400", "ssv2")] == [False, True, False]
    clip = torch.arange(32, dtype=torch.uint8).expand(2, 3, 32, 32)
    leaning = {flip: set() for flip in (True, False)}
    for flip, seen in leaning.items():
        augment = finetune.training_augmentation(32, 0.5, flip, rand_augment=False, erasing=0)
        for i in range(30):
            with cmaev.seeded(i):
                seen.add(bool(augment(clip).float()[0, 0, 0].diff().sum() > 0))
    assert leaning == {True: {True, False}, False: {True}}


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_labels_are_the_shares_of_the_pixels(mixup, cutmix):
    """Clip i is filled with the number 10^i, so that the mean of a mixed clip tells whose pixels it has."""
    mix, labels = finetune.mixing(mixup, cutmix, classes=3), torch.tensor([2, 0, 1])
    for i in range(10):
        with cmaev.seeded(i):
            clips, soft = mix((10.0 ** torch.arange(3)).view(3, 1, 1, 1, 1).expand(-1, 3, 2, 8, 8), labels)
        for b in range(3):
            expected = sum(float(soft[b, labels[k]]) * 10.0**k for k in range(3))
            assert float(clips[b].mean()) == pytest.approx(expected, rel=1e-4)
        assert soft.sum(dim=1) == pytest.approx([1, 1, 1])


def test_clips_of_one_video_are_not_mixed():
    """Of videos with a class each and two clips each, every mixed clip has two labels, unless its share is 0 or 1."""
    batch = {"clip": torch.arange(6.).view(6, 1, 1, 1, 1, 1).expand(-1, 2, 3, 2, 8, 8), "label": torch.arange(6).view(
        6, 1).expand(-1, 2)}
    batch = next(cmaev.Feed([batch], torch.device("cpu")))
    assert batch["label"].tolist() == batch["clip"][:, 0, 0, 0, 0].tolist() == [*range(6)] * 2
    for alphas in ((0.8, 0), (0, 1.0)):
        unmixed = 0
        for i in range(20):
            with cmaev.seeded(i):
                unmixed += int((finetune.mixing(*alphas, 6)(batch["clip"], batch["label"])[1].amax(dim=1) > 0.999).sum())
        assert unmixed < 0.3 * 20 * 12  # a half, where neighbours are of one video


def float64_vit(state, clip, heads):
    """The classifier of a ViT, word by word in float64 numpy."""
    w = {name: value.double().numpy() for name, value in state.items()}
    norm = lambda x, name: (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-6) * w[name + ".weight"] + w[name + ".bias"]
    linear = lambda x, name: x @ w[name + ".weight"].T + w[name + ".bias"]
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
    kernel, scores = w["encoder.patch_embed.proj.weight"], []
    _, _, t, p, _ = kernel.shape
    for video in clip.double().numpy():
        tokens = []
        for n, (i, j, k) in enumerate(np.ndindex(video.shape[1] // t, video.shape[2] // p, video.shape[3] // p)):
            cube = video[:, i * t:i * t + t, j * p:j * p + p, k * p:k * p + p]
            place = [(math.cos if d % 2 else math.sin)(n / 10000 ** (2 * (d // 2) / len(kernel)))
                     for d in range(len(kernel))]
            tokens.append([(kernel[d] * cube).sum() + w["encoder.patch_embed.proj.bias"][d] + place[d]
                           for d in range(len(kernel))])
        x, block = np.array(tokens), 0
        while f"encoder.blocks.{block}.norm1.weight" in w:
            name = f"encoder.blocks.{block}."
            q, k, v = np.split(linear(norm(x, name + "norm1"), name + "attn.qkv"), 3, axis=1)
            heads_out = []
            for q, k, v in zip(*(np.split(part, heads, axis=1) for part in (q, k, v))):
                weights = np.exp(q @ k.T / math.sqrt(q.shape[1]))
                heads_out.append(weights / weights.sum(-1, keepdims=True) @ v)
            x = x + linear(np.concatenate(heads_out, axis=1), name + "attn.proj")
            x = x + linear(gelu(linear(norm(x, name + "norm2"), name + "mlp.fc1")), name + "mlp.fc2")
            block += 1
        scores.append(linear(norm(x.mean(0), "fc_norm"), "head"))
    return torch.from_numpy(np.array(scores)).float()


def test_classifier_equals_float64():
    model, clip = finetune.Classifier(small("vit", drop_path=0.2), 5).eval(), torch.randn(2, 3, 4, 32, 48)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    torch.testing.assert_close(model(clip), float64_vit(model.state_dict(), clip, heads=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "convvit"])
def test_layer_decay_by_name(name):
    sizes = dict(fusion=False) if name == "convvit" else {}
    model = finetune.Classifier(small(name, **sizes), 5)
    scales = {"fc_norm": 0, "head": 0, "patch_embed": 3, "embed_norms": 3, "blocks1": 3, "blocks2": 3}
    scales |= {f"{blocks}.{i}.": 2 - i for i in range(2) for blocks in ("blocks", "blocks3")}
    groups = finetune.layer_groups(model, 0.05, 0.5)
    names, seen = {id(p): name for name, p in model.named_parameters()}, 0
    for group in groups:
        for p in group["params"]:
            name = names[id(p)].removeprefix("encoder.")
            power, = {power for start, power in scales.items() if name.startswith(start)}
            assert group["scale"] == 0.5**power and group["weight_decay"] == (0.05 if p.ndim > 1 else 0), name
            seen += 1
    assert seen == len(names)


def videomae_names(state, prefix):
    """This project's ViT as VideoMAE's files hold it."""
    out = {}
    for name, value in state.items():
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            out |= {prefix + name.replace("qkv.bias", "q_bias"): q, prefix + name.replace("qkv.bias", "v_bias"): v}
        else:
            out[prefix + name] = value
    return out


def hugging_face_names(state, biases, prefix="videomae."):
    """The same as Hugging Face's VideoMAE holds it; `biases` is how: q_bias (transformers 4) or query.bias (5)."""
    out, block = {}, {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                      "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for name, value in state.items():
        part, kind = name.rsplit(".", 1)
        if part == "patch_embed.proj":
            out[f"{prefix}embeddings.patch_embeddings.projection.{kind}"] = value
        elif part == "norm":
            out[f"{prefix}layernorm.{kind}"] = value
        else:
            _, i, inner = part.split(".", 2)
            layer = f"{prefix}encoder.layer.{i}."
            if inner == "attn.qkv":
                for letter, word, piece in zip("qkv", ("query", "key", "value"), value.chunk(3)):
                    if kind == "weight":
                        out[f"{layer}attention.attention.{word}.weight"] = piece
                    elif letter != "k":
                        out[f"{layer}attention.attention." + (f"{letter}_bias" if biases == "q_bias" else
                                                              f"{word}.bias")] = piece
            else:
                out[f"{layer}{block[inner]}.{kind}"] = value
    return out


@pytest.fixture
def encoder_without_k_bias():
    encoder = small("vit")
    for block in encoder.blocks:
        block.attn.qkv.bias.data.view(3, -1)[1] = 0
    return encoder


LAYOUTS = {
    "VideoMAE, pre-trained": lambda state: {
        "model": videomae_names(state, "encoder.") | {"decoder.norm.bias": torch.ones(3)}},
    "VideoMAE, fine-tuned": lambda state: {"module": videomae_names(
        {name: value for name, value in state.items() if not name.startswith("norm")}, "")
        | {"fc_norm.weight": torch.ones(24)}},
    "transformers 4": lambda state: hugging_face_names(state, "q_bias"),
    "transformers 5": lambda state: hugging_face_names(state, "query.bias"),
    "transformers, bare model": lambda state: hugging_face_names(state, "q_bias", prefix=""),
    "training script's": lambda state: {
        "model": videomae_names(state, "encoder."), "epoch": 799, "best": np.float64(1), "history": np.arange(3),
        "args": argparse.Namespace(lr=1e-3, output_dir=Path("runs"))},
    "state_dict": lambda state: {"state_dict": {f"backbone.{n}": v for n, v in state.items()}},
    "model_state": lambda state: {"model_state": state, "optimizer_state": {}},
    "teacher": lambda state: {"student": {}, "teacher": {f"module.backbone.{n}": v for n, v in state.items()}},
    "ours, checkpoint": lambda state: {"step": 3, "model": {f"encoder.{n}": v for n, v in state.items()}
                                       | {f"target_encoder.{n}": 2 * v for n, v in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_weights_load_into_the_right_places(tmp_path, encoder_without_k_bias, layout, capsys):
    state, path = encoder_without_k_bias.state_dict(), tmp_path / "weights.bin"
    foreign = LAYOUTS[layout](state)
    torch.save(foreign, path)
    loaded = cmaev.load_encoder(path, cmaev.VisionTransformer(24, 2, 2, **SMALL)).state_dict()
    for name, value in state.items():
        assert name.startswith("norm.") and "fine-tuned" in layout or torch.equal(loaded[name], value), name
    loaded = len(state) - 2 * ("fine-tuned" in layout)
    assert f"{loaded} of the encoder's {len(state)} weights" in capsys.readouterr().out
    inner = next((foreign[key] for key in cmaev.WRAPPERS if key in foreign), foreign)
    lost = next(name for name in inner if "fc1.weight" in name or "intermediate.dense.weight" in name)
    del inner[lost]
    torch.save(foreign, path)
    with pytest.raises(cmaev.CMAEVError, match=r"has no blocks\.0\.mlp\.fc1\.weight"):
        cmaev.load_encoder(path, small("vit"))


def test_saved_encoder_comes_back_for_another_grid(tmp_path, encoder_without_k_bias):
    cmaev.save_encoder(encoder_without_k_bias, tmp_path / "encoder.pt")
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert saved["model"].keys() == videomae_names(encoder_without_k_bias.state_dict(), "").keys()
    larger = cmaev.load_encoder(tmp_path, cmaev.VisionTransformer(24, 2, 2, **SMALL | dict(frames=8, size=64)))
    assert torch.equal(larger.positions, cmaev.sincos_table(64, 24))
    assert torch.equal(larger.blocks[1].attn.qkv.bias, encoder_without_k_bias.blocks[1].attn.qkv.bias)
    with pytest.raises(cmaev.CMAEVError, match=r"patch_embed.proj.weight is \[24, 3, 2, 16, 16\], not \[48"):
        cmaev.load_encoder(tmp_path, cmaev.VisionTransformer(48, 2, 2, **SMALL))


def test_decoder_of_a_videomae_file_gives_its_loss(tmp_path):
    model, (online, _, mask) = tiny(contrast_weight=0.0)
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.attn.qkv.bias.data.view(3, -1)[1] = 0
    decoder = {f"decoder.{name}": value for name, value in model.decoder.state_dict().items()}
    decoder["mask_token"] = decoder.pop("decoder.mask_token").view(1, 1, -1)
    decoder["encoder_to_decoder.weight"] = decoder.pop("decoder.embed.weight")
    state = videomae_names(model.encoder.state_dict(), "encoder.") | videomae_names(decoder, "")
    torch.save({"model": state}, tmp_path / "videomae.pth")
    torch.manual_seed(1)
    other = cmaev.CMAEV("vit_test", contrast_weight=0.0, **TINY)
    cmaev.load_encoder(tmp_path / "videomae.pth", other.encoder, other.decoder)
    assert other(online, None, mask)["loss"] == model(online, None, mask)["loss"]


def test_weights_that_would_run_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    torch.save({"model": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(cmaev.CMAEVError, match="cannot be read as weights .it holds a .*run code: save its state"):
        cmaev.load_encoder(tmp_path / "bad.pt", small("vit"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_folders_of_hugging_faces(tmp_path, encoder_without_k_bias, suffix, shards):
    """As save_pretrained writes them: one file, or several with an index."""
    state, stem = encoder_without_k_bias.state_dict(), {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    write_file = torch.save if suffix == "bin" else pytest.importorskip("safetensors.torch").save_file
    foreign = {name: value.clone() for name, value in hugging_face_names(state, "q_bias").items()}
    names = [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
    index = {name: names[i % shards] for i, name in enumerate(foreign)}
    for file in names:
        write_file({name: foreign[name] for name in foreign if index[name] == file}, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    if shards == 2:
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    loaded = cmaev.load_encoder(tmp_path, cmaev.VisionTransformer(24, 2, 2, **SMALL)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    if shards == 2:
        index = tmp_path / f"{stem}.{suffix}.index.json"
        for text in ("{}", "no json", "[]"):
            (tmp_path / "other").mkdir(exist_ok=True)
            (tmp_path / "other" / index.name).write_text(text)
            with pytest.raises(cmaev.CMAEVError, match="is no index of weights"):
                cmaev.load_encoder(tmp_path / "other", small("vit"))
    (tmp_path / names[-1]).unlink()
    with pytest.raises(cmaev.CMAEVError, match="no such file|cannot be read"):
        cmaev.load_encoder(tmp_path, small("vit"))


def test_probes_separate_what_is_separable():
    centres = torch.randn(5, 16) * 4
    labels = torch.arange(100) % 5
    train, test = (centres[labels] + 0.3 * torch.randn(100, 16) for _ in range(2))
    for probe in (finetune.linear_probe, finetune.nearest_neighbours):
        scores = probe(train, labels, test, 5)
        assert (scores.argmax(dim=1) == labels).all() and scores.sum(dim=1) == pytest.approx([1] * 100, abs=1e-4)


def test_report(tmp_path):
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    videos = [("a.mp4", 0), ("b.mp4", 1), ("c.mp4", 1), ("d.mp4", 2)]
    assert finetune.report(scores, videos, ["x", "y", "z"], tmp_path) == (50, 100)
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert rows[2] == "b.mp4,y,z,0.7000,y,0.2000,x,0.1000" and len(rows) == 5
    assert json.loads((tmp_path / "per-class.json").read_text()) == {"x": 100, "y": 50, "z": 0}


TUNE = ("--recipe demo --frames 4 --size 32 --patch 8 --batch-size 8 --epochs 3 --amp none --warmup-epochs 1 "
        "--log-every 4 --save-every 3 --mixup 0.8 --cutmix 1 --rand-augment --erasing 0.25 --repeats 2 --segments 2 "
        "--crops 2"
        ).split()


def run_finetune(*arguments):
    if "--data" in arguments and "--recipe" not in arguments:
        arguments = "--recipe", "demo", *arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
        try:
            cmaev.run_script(finetune.main)
        except SystemExit as end:
            return str(end)


@pytest.fixture(scope="module")
def tuned(demo, undisturbed):
    run = demo.parent / "tuned"
    lists = ["--data", demo / "train.txt", "--val", demo / "val.txt", "--init", undisturbed]
    assert run_finetune(*TUNE, *lists, "--out", run, "--workers", 0) is None
    return run


def test_finetune_from_start_to_prediction(demo, tuned, undisturbed, capsys):
    rows = (tuned / "predictions.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        [path, cmaev.DEMO_CLASSES[label]] for path, label in cmaev.read_list(demo / "val.txt")]
    ask = [*TUNE, "--out", tuned, "--workers", 0, "--data", demo / "train.txt", "--val", demo / "val.txt"]
    assert run_finetune(*ask, "--eval") is None
    assert (tuned / "eval" / "predictions.csv").read_text().splitlines() == rows
    file = cmaev.read_list(demo / "val.txt")[3][0]
    capsys.readouterr()
    assert run_finetune(*ask, "--predict", file) is None
    answer = capsys.readouterr().out
    assert answer.startswith(file) and rows[4].split(",")[2] in answer and answer.count("%") == 5
    for probe in ("linear", "knn"):
        assert run_finetune(*ask, "--probe", probe, "--init", undisturbed) is None
        assert f"{probe} probe of {undisturbed}: top-1 " in capsys.readouterr().out
    assert run_finetune(*ask, "--init", undisturbed) is None
    assert "is finished" in capsys.readouterr().out


def test_killed_finetuning_is_bit_equal(demo, tuned, undisturbed):
    run = demo.parent / "killed-tuning"
    command = [*TUNE, "--data", demo / "train.txt", "--val", demo / "val.txt", "--init", undisturbed, "--out", run]
    process = subprocess.Popen([sys.executable, HERE / "finetune.py", *map(str, command), "--workers", "1"],
                               stdout=subprocess.DEVNULL)
    assert wait_for((run / "checkpoint.pt").exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 15
    assert run_finetune(*command, "--workers", 2) is None
    weights, expected = (torch.load(r / "checkpoint.pt", weights_only=True)["model"] for r in (run, tuned))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (run / "predictions.csv").read_text() == (tuned / "predictions.csv").read_text()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_score_every_video_once(demo, tuned, two_ranks, three_ranks, world):
    assert (demo.parent / f"scored-{world}.csv").read_text() == (tuned / "predictions.csv").read_text()


@pytest.mark.parametrize("flag, values, words", [
    ("epochs batch-size frames size tubelet patch rate log-every save-every repeats", "0 -1", "[1, inf)"),
    ("warmup-epochs max-shift subset picture-every contrast-weight weight-decay clip-grad seed workers", "-1", "[0, inf)"),
    ("lr temperature", "0 -1 nan inf", "(0, inf)"), ("mask-ratio", "0 1 nan", "(0, 1)"),
    ("momentum bad-share", "-0.1 1.1 nan", "[0, 1]"), ("beta1 beta2", "-0.1 1", "[0, 1)"),
    ("warmup-epochs", "50 51", "less than the 50 of --epochs"), ("lr epochs", "x", "invalid"), ("epoch", "3", "--epoch")])
def test_numbers_out_of_range(flag, values, words):
    for name in flag.split():
        for value in values.split():
            end = run_pretrain(f"--{name}={value}")
            assert end.startswith("error: ") and f"--{name}" in end and words in end and "\n" not in end


@pytest.mark.parametrize("arguments, words", [
    *((f"--{name}=0", "[1, inf)") for name in ("batch-size", "segments", "crops", "log-every", "repeats", "epochs")),
    ("--layer-decay=0", "(0, 1]"), ("--smoothing=1", "[0, 1)"), ("--drop-path=1", "[0, 1)"),
    ("--mixup=-1", "[0, inf)"), ("--erasing=2", "[0, 1]"), ("--predict", "name one or more videos"),
    ("--val good.txt", "--val without --data"), ("--data good.txt --val good.txt", "--data without --recipe: give "),
    ("--recipe demo --data one.txt --val good.txt --init none --probe linear", "two or more training videos"),
    ("--recipe demo --data good.txt --val good.txt --init none --batch-size 1 --mixup 1", "two or more videos per")])
def test_numbers_out_of_range_in_finetuning(wrong, monkeypatch, arguments, words):
    monkeypatch.chdir(wrong)
    Path("one.txt").write_text("good.mp4 0\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *arguments.split()])
        with pytest.raises(SystemExit) as end:
            cmaev.run_script(finetune.main)
    assert str(end.value).startswith("error: ") and words in str(end.value) and "\n" not in str(end.value)
    assert not Path("runs").exists()


def test_eval_and_predict_take_the_settings_of_the_run(demo, tuned, capsys):
    """Without one flag beside --out; a flag by hand wins; the run's own report stays."""
    before, name = (tuned / "predictions.csv").read_text(), tuned.parent / "-x.mp4"
    ask = ["--out", tuned, "--workers", 0]
    assert run_finetune(*ask, "--eval") is None
    assert (tuned / "eval" / "predictions.csv").read_text() == before == (tuned / "predictions.csv").read_text()
    assert "2 x 2 views" in capsys.readouterr().out
    assert run_finetune(*ask, "--eval", "--segments", 1) is None
    assert "1 x 2 views" in capsys.readouterr().out and (tuned / "predictions.csv").read_text() == before
    shutil.copy(cmaev.read_list(demo / "val.txt")[3][0], name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tuned.parent)
        assert run_finetune(*ask, "--predict", "--", name.name) is None
        assert capsys.readouterr().out.startswith("-x.mp4: " + before.splitlines()[4].split(",")[2])
        assert run_finetune(*ask, "--predict=-x.mp4") is None


def test_own_videos_without_val_hold_out_a_tenth(demo, undisturbed, capsys):
    command = [*TUNE, "--data", demo / "train.txt", "--init", undisturbed, "--probe", "knn", "--workers", 0]
    assert run_finetune(*command) is None
    output = capsys.readouterr().out
    assert "no --val: 10 of the 40 videos" in output and "of 10 videos, 30 labels" in output


@pytest.mark.parametrize("arguments, words", [
    ("--data good.txt --val large.txt",
     "large.txt: good.mp4 has label 7: give 0 to 0, the classes of the training list"),
    ("--data gap.txt --val good.txt", "class 1 of 0 to 2 has no video in the list"),
    ("--data none.txt --val good.txt", "good.mp4 has no label"),
    ("--data good.txt --val good.txt --init lost.pt", "lost.pt: no such file of weights"),
    ("--data good.txt --val good.txt --init text.mp4", "text.mp4 cannot be read as weights"),
    ("--data good.txt --val good.txt --init other.pt",
     "other.pt is of another model: it has no patch_embed.proj.weight"),
    ("--data good.txt --val good.txt --init none --probe deep", "--probe: invalid choice"),
    ("--data good.txt --val good.txt --init none --sampling often", "--sampling: invalid choice"),
    ("--data good.txt --val text.txt --init none --batch-size 4 --probe knn --workers 1", "text.mp4: cannot be opened"),
    ("--predict good.mp4 --out nothing", "nothing holds no run of finetune.py"),
    ("--recipe k400", "--data is not given"),
])
def test_wrong_input_to_finetune_ends_in_one_line(wrong, monkeypatch, arguments, words):
    monkeypatch.chdir(wrong)
    Path("large.txt").write_text("good.mp4 7\n")
    Path("gap.txt").write_text("good.mp4 0\ngood.mp4 2\n")
    Path("none.txt").write_text("good.mp4\n")
    torch.save({"model": {"a": torch.ones(1)}}, "other.pt")
    end = run_finetune("--batch-size", 4, *arguments.split())
    assert end.startswith("error: ") and words in end and "\n" not in end
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Faults: kills, bad videos, bad numbers, bad weights, full disks, hostile files. Longer forms: LONG=1 pytest -k faults
# ---------------------------------------------------------------------------------------------------------------------


def start(script, *arguments, **how):
    return subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, **how)


def wait_for(what, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return process.poll() is None


def all_gone(*groups, seconds=30):
    """Whether the processes of these groups end: a decoding process asks every 5 s whether its trainer lives."""
    deadline = time.monotonic() + seconds
    while alive := subprocess.run(["pgrep", "-g", ",".join(map(str, groups))], capture_output=True).stdout:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return not alive


def same_weights(*runs):
    states = [torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_faults_kill_9_anywhere(demo, undisturbed, tuned, script):
    """At random moments, and every other time while a checkpoint is being written."""
    run, rng, expected = demo.parent / f"kill-{script}", np.random.default_rng(0), undisturbed
    command = [*SHORT, "--data", demo / "train.txt", "--out", run, "--save-every", 1]
    if script == "finetune.py":
        command = [*TUNE, "--data", demo / "train.txt", "--val", demo / "val.txt", "--init", undisturbed, "--out", run,
                   "--save-every", 1]
        expected = tuned
    kills, groups, partial = 0, [], run / "checkpoint.pt.partial"
    for i in range(20 if LONG else 2):
        process = start(script, *command, "--workers", i % 3, start_new_session=True)
        groups.append(process.pid)
        began = time.time()
        if i % 2 == 0:
            wait_for(partial.exists, process)
        else:
            wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_mtime > began, process)
            time.sleep(rng.uniform(0, 1))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= (10 if LONG else 1)  # the last ones may come after the end
    process = start(script, *command)
    assert process.wait() == 0, process.stderr.read()
    assert all_gone(*groups)
    assert same_weights(run, expected) and not partial.exists()
    keep = ("step", "loss", "grad_norm", "lr")
    logs = [[[line[name] for name in keep] for line in cmaev.read_log(r) if "loss" in line] for r in (run, expected)]
    assert logs[0] == logs[1]


def test_faults_sigterm_and_ctrl_c_save_and_leave_nothing_running(demo, undisturbed):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    for sent, code in ((signal.SIGTERM, cmaev.SAVED_AND_STOPPED), (signal.SIGINT, 130)):
        run = demo.parent / f"signal-{sent}"
        command = [*SHORT, "--data", demo / "train.txt", "--out", run, "--save-every", 1000, "--workers", 2,
                   "--log-every", 1]
        process = start("pretrain.py", *command, start_new_session=True)
        assert wait_for(lambda: (run / "log.jsonl").exists() and cmaev.read_log(run), process)
        os.killpg(process.pid, sent)  # to the decoding processes, too, as a terminal and SLURM do
        assert process.wait(60) == code, process.stderr.read()
        assert all_gone(process.pid, seconds=10)
        assert 1 <= torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 20
        assert run_pretrain(*command) is None and same_weights(run, undisturbed)


def test_faults_a_decoding_process_does_not_outlive_a_trainer_killed_at_its_start():
    ours, theirs = os.pipe()

    def decode():
        time.sleep(0.5)
        cmaev.ignore_signals(0)
        os.write(theirs, b"still there")
        os._exit(0)
    trainer = os.fork()
    if trainer == 0:
        multiprocessing.get_context("fork").Process(target=decode).start()
        os._exit(0)
    os.waitpid(trainer, 0)
    os.close(theirs)
    assert os.read(ours, 100) == b""
    os.close(ours)


def test_faults_another_number_of_ranks_goes_on_with_the_same_samples(demo, undisturbed):
    run = demo.parent / "one-then-two"
    command = [*SHORT, "--data", demo / "train.txt", "--out", run, "--workers", 0]
    process = start("pretrain.py", *command)
    assert wait_for(lambda: (run / "log.jsonl").exists() and cmaev.read_log(run), process)
    process.terminate()
    assert process.wait(60) == cmaev.SAVED_AND_STOPPED
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    HERE / "pretrain.py", *map(str, command)], check=True, timeout=300)
    same_but_for_rounding(run, undisturbed)


def test_faults_bad_numbers_are_left_out(demo, tmp_path, monkeypatch):
    forward, calls, bad = cmaev.CMAEV.forward, [], {3}

    def with_nan(self, *batch):
        losses = forward(self, *batch)
        calls.append(0)
        return losses | {"loss": losses["loss"] * (math.nan if len(calls) - 1 in bad else 1)}
    monkeypatch.setattr(cmaev.CMAEV, "forward", with_nan)
    command = [*SHORT, "--data", demo / "train.txt", "--workers", 0, "--log-every", 1, "--picture-every", 0]
    assert run_pretrain(*command, "--out", tmp_path / "one") is None
    log = cmaev.read_log(tmp_path / "one")
    assert [line["skipped_steps"] for line in log] == [0] * 3 + [1] * 17
    assert all(math.isfinite(line["loss"]) for line in log)
    calls.clear()
    bad = set(range(8, 40))
    end = run_pretrain(*command, "--epochs", 8, "--out", tmp_path / "many")
    assert end.startswith("error: step 28: 20 steps in a row had a loss or a gradient that is not finite")
    checkpoint = torch.load(tmp_path / "many" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 27 and all(x.isfinite().all() for x in checkpoint["model"].values())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_faults_a_skipped_step_changes_nothing(dtype):
    torch.manual_seed(0)
    layer, cpu, steps = torch.nn.Linear(4, 1), torch.device("cpu"), []
    optimizer, scaler = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True), cmaev.grad_scaler(dtype, cpu)
    meter = cmaev.Meter(["loss"], cpu)
    for factor in (1.0, math.nan, math.inf, 1e38 if dtype else math.nan, 1.0):
        loss = layer(torch.ones(1, 4)).sum() * factor
        grad_norm = cmaev.optimizer_step(loss, layer.parameters(), optimizer, scaler, dtype)
        meter.add([loss.detach()], grad_norm, torch.zeros(2, dtype=torch.bool))
        steps.append((layer.weight.detach().clone(), loss.item()))
    assert all(torch.equal(steps[0][0], steps[i][0]) for i in (1, 2, 3)) and not torch.equal(steps[3][0], steps[4][0])
    record = meter.read(5, 1, 1, 1)
    assert record["skipped_steps"] == 3 and record["loss"] == pytest.approx((steps[0][1] + steps[4][1]) / 2)


def test_faults_a_bad_loss_on_one_rank_stops_the_step_on_all(two_ranks):
    (one, weights), (other, same) = (zip(*torch.load(two_ranks / f"skipped-{rank}.pt", weights_only=True))
                                     for rank in (0, 1))
    assert one == other == (True, False, True)
    assert all(map(torch.equal, weights, same))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def spoil(good, folder, count):
    """Files made from good ones by truncation, flipped bytes, zeroed blocks and the like; some may still play."""
    folder.mkdir()
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        source = Path(good[i % len(good)])
        data = bytearray(source.read_bytes())
        kind, suffix = i % 8, source.suffix
        if kind == 0:
            del data[rng.integers(len(data)):]
        elif kind == 1:
            for at in rng.integers(0, len(data), 30):
                data[at] ^= 1 << rng.integers(8)
        elif kind == 2:
            at = rng.integers(len(data))
            data[at:at + 2000] = bytes(len(data[at:at + 2000]))
        elif kind == 3:
            suffix = (".avi", ".webm", ".ts")[i % 3]
        elif kind == 4:
            data = bytearray((b"", b"no video\n" * 99, bytes(5000))[i // 8 % 3])
        elif kind == 5 and b"tkhd" in data:  # absurd width and height, in the track and in the sample description
            at = data.index(b"tkhd") + 4
            data[at + 76:at + 84] = b"\xff\xff\xff\xff" * 2
            at = data.find(b"avc1", data.index(b"stsd"))
            data[at + 28:at + 32] = b"\xff\xff\xff\xff"
        elif kind == 6 and b"mvhd" in data:  # absurd duration
            at = data.index(b"mvhd") + 4
            data[at + 16:at + 20] = b"\xff\xff\xff\xff"
        elif kind == 7:
            head = len(data) // 3
            data = data[:head] + bytes(rng.integers(0, 256, len(data) - head, dtype=np.uint8))
        paths.append(folder / f"{i:03d}{suffix}")
        paths[-1].write_bytes(data)
    return paths


@pytest.fixture(scope="module")
def spoilt(demo, wrong):
    videos = [path for path, _ in cmaev.read_list(demo / "train.txt")]
    for name in ("x.mkv", "x.avi", "x.webm"):
        write(demo.parent / name, codec="libvpx" if name == "x.webm" else "libx264")
        videos.insert(3, demo.parent / name)
    bad = spoil(videos, demo.parent / "spoilt", 300 if LONG else 60) + [wrong / "audio.mp4"]
    (demo.parent / "mixed.txt").write_text("".join(f"{path}\n" for path in [*bad, *(videos * (8 if LONG else 1))]))
    return bad


def resident(process="self"):
    """MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4 / 1024


def open_files(process="self"):
    return len(os.listdir(f"/proc/{process}/fd"))


def test_faults_bad_videos_are_replaced(demo, spoilt):
    """Each is read or replaced, in time and without growth; the replacement is a pure function, and is named."""
    videos = cmaev.read_list(demo.parent / "mixed.txt")
    clips, slowest, log = clips_of(demo), 0.0, demo.parent / "replaced.jsonl"
    clips.videos, clips.log = videos, log
    gc.collect()
    gc.disable()  # what waits for Python's collector stays
    opened = open_files()
    for turn in range(3):
        if turn == 1:
            before = resident()
        for i in range(len(spoilt)):
            began = time.monotonic()
            clips[0, i]
            slowest = max(slowest, time.monotonic() - began)
    grown, left_open = resident() - before, open_files() - opened
    gc.enable()
    reasons = {line["path"]: line["reason"] for line in map(json.loads, log.open())}
    print(f"{len(reasons)} of {len(spoilt)} bad, slowest {slowest:.2f} s, memory {grown:+.1f} MiB")
    assert left_open == 0 and grown < 30 and slowest < 10 and len(reasons) >= len(spoilt) // 4
    first = next(i for i, (path, _) in enumerate(videos) if path in reasons)
    one, two = clips[1, first], clips[1, first]
    assert all(torch.equal(one[name], two[name]) for name in one) and one["replaced"].all()
    assert videos[first][0] in reasons[videos[first][0]] and len(log.read_text().splitlines()) == len(reasons)
    gone = shutil.copy(videos[-1][0], demo.parent / "gone.mp4")
    clips.videos[-1] = str(gone), None
    assert not clips[0, len(videos) - 1]["replaced"].any()
    gone.unlink()
    assert clips[0, len(videos) - 1]["replaced"].all() and "no such file" in log.read_text().splitlines()[-1]


def bad_videos_of(run):
    return [json.loads(line)["path"] for line in (run / "bad-videos.jsonl").open()]


def test_faults_bad_videos_are_named_once_counted_and_limited(demo, spoilt, capfd):
    command = [*SHORT, "--data", demo.parent / "mixed.txt", "--epochs", 2, "--workers", 2]
    runs = [demo.parent / f"mixed-{i}" for i in range(3)]
    assert run_pretrain(*command, "--out", runs[0], "--bad-share", 1) is None
    output = capfd.readouterr().out
    named = bad_videos_of(runs[0])
    assert len(named) == len(set(named)) == output.count("bad video: ") > 5
    count = cmaev.read_log(runs[0])[-1]["bad_clips"]
    clips, read = clips_of(demo, seed=0, rate=4), cmaev.read_list(demo.parent / "mixed.txt")
    clips.videos, clips.log = read, runs[0] / "again.jsonl"
    replaced = [bool(clips[key]["replaced"]) for batch in cmaev.batches(len(read), 8, 2 * (len(read) // 8), 0)
                for key in batch]
    assert count == sum(replaced) > len(named) and f"; {count} of " in output
    assert set(named) == {json.loads(line)["path"] for line in clips.log.open()}
    end = run_pretrain(*command, "--out", runs[1])
    assert "clips were of bad videos" in end and end.endswith("or give a larger --bad-share")
    assert run_pretrain(*command, "--out", runs[1], "--bad-share", 1, "--workers", 0) is None
    assert same_weights(*runs[:2])
    capfd.readouterr()
    assert run_pretrain(*command, "--out", runs[2], "--bad-share", 1, "--repeats", 2) is None
    assert f" of {2 * (len(read) // 4) * 8} clips were of bad videos" in capfd.readouterr().out


def test_faults_a_bad_video_counts_as_wrong_in_testing(demo, tuned, wrong, capsys):
    listed = cmaev.read_list(demo / "val.txt")
    (demo.parent / "holed.txt").write_text("".join(f"{path} {label}\n" for path, label in listed)
                                           + f"{wrong}/audio.mp4 0\n")
    ask = [*TUNE, "--out", tuned, "--workers", 0, "--eval", "--data", demo / "train.txt"]
    right = []
    for name in ("demo/val.txt", "holed.txt"):
        assert run_finetune(*ask, "--val", demo.parent / name) is None
        right.append([row.split(",")[1] == row.split(",")[2] for row in
                      (tuned / "eval" / "predictions.csv").read_text().splitlines()[1:]])
    output = capsys.readouterr().out
    assert right[1] == right[0] + [False] and f"of {len(listed) + 1} videos" in output and "audio.mp4: has no" in output
    assert f"top-1 {100 * np.mean(right[1]):.2f} %" in output
    for probe in ("linear", "knn"):
        assert run_finetune(*ask[:-3], "--probe", probe, "--init", "none", "--data", demo.parent / "holed.txt",
                            "--val", demo.parent / "holed.txt") is None
    assert run_finetune(*ask[:-3], "--predict", wrong / "audio.mp4") == "error: not all of these files could be read"


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_faults_damaged_weights(demo, undisturbed, tmp_path, how):
    data = bytearray((undisturbed / "encoder.pt").read_bytes())
    if how == "truncated":
        del data[len(data) // 2:]
    else:
        data[len(data) // 2] ^= 1
    (tmp_path / "encoder.pt").write_bytes(data)
    with pytest.raises(cmaev.CMAEVError, match="cannot be read as weights"):
        cmaev.read_weights(tmp_path / "encoder.pt")
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(cmaev.CMAEVError, match="cannot be read"):
        cmaev.read_checkpoint(tmp_path / "checkpoint.pt")


def test_faults_full_disk(demo, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk, from the second checkpoint on."""
    import resource
    save, limits, saved = cmaev.save_encoder, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def then_full(encoder, path):
        save(encoder, path)
        saved.append(path)
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    monkeypatch.setattr(cmaev, "save_encoder", then_full)
    try:
        end = run_pretrain(*SHORT, "--data", demo / "train.txt", "--out", tmp_path / "run", "--workers", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert end == f"error: {tmp_path}/run/checkpoint.pt cannot be written (File too large): the previous file is kept"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert not list((tmp_path / "run").glob("*.partial"))


def test_faults_edited_list(demo, tmp_path):
    lines = (demo / "train.txt").read_text().splitlines()
    (tmp_path / "list.txt").write_text("".join(f"{demo}/{line}\n" for line in lines))
    command = [*SHORT, "--data", tmp_path / "list.txt", "--out", tmp_path / "run", "--workers", 0, "--epochs", 2]
    assert run_pretrain(*command) is None
    (tmp_path / "list.txt").write_text("".join(f"{demo}/{line}\n" for line in lines[:-1]))
    assert "has changed since" in run_pretrain(*command)


def test_faults_hostile_files(tmp_path):
    """Nothing of another file and no address is opened; frames beyond the bounds are refused before they are made."""
    import socket
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
    write(tmp_path / "a.mp4", frames=5)
    hostile = {"list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n",
               "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.mp4\n#EXT-X-ENDLIST\n",
               "concat.mp4": f"ffconcat version 1.0\nfile {tmp_path}/a.mp4\n",
               "manifest.mpd": f"<?xml version='1.0'?><MPD><Period><BaseURL>{address}</BaseURL></Period></MPD>"}
    for name, text in hostile.items():
        (tmp_path / name).write_text(text)
    for path in [*(tmp_path / name for name in hostile), address, f"concat:{tmp_path}/a.mp4", "/dev/zero"]:
        with pytest.raises(cmaev.CMAEVError, match="cannot be opened"):
            cmaev.Video(path)
    with pytest.raises(TimeoutError):
        server.accept()
    assert set(cmaev.CONTAINERS.split(",")) <= {part for name in av.formats_available for part in name.split(",")}


def test_faults_bounds_of_frames(tmp_path, monkeypatch):
    path = write(tmp_path / "v.mp4", frames=20)
    (tmp_path / "images").mkdir()
    write_png(torch.zeros(3, 48, 64, dtype=torch.uint8), str(tmp_path / "images" / "0.png"))
    write_jpeg(torch.zeros(3, 48, 64, dtype=torch.uint8), str(tmp_path / "images" / "1.jpg"))
    monkeypatch.setattr(cmaev, "MAX_BYTES", 10 * 48 * 64 * 3)
    assert len(cmaev.Video(path).read(range(10))) == 10
    with pytest.raises(cmaev.CMAEVError, match="11 frames of 64x48 pixels are too large"):
        cmaev.Video(path).read(range(11))
    video = cmaev.Video(path)
    monkeypatch.setattr(cmaev, "MAX_SECONDS", -1)
    with pytest.raises(cmaev.CMAEVError, match="takes more than -1 s"):
        video.read(range(3))
    monkeypatch.setattr(cmaev, "MAX_SECONDS", 60)
    monkeypatch.setattr(cmaev, "MAX_PIXELS", 3000)
    with pytest.raises(cmaev.CMAEVError, match="frames of 64x48 pixels are too large"):
        cmaev.Video(path)
    for i in range(2):
        with pytest.raises(cmaev.CMAEVError, match="frames of 64x48 pixels are too large"):
            cmaev.Video(tmp_path / "images").read([i])


@pytest.mark.skipif(not LONG, reason="takes minutes: LONG=1 pytest -k faults")
def test_faults_a_lost_worker_of_four(demo, undisturbed):
    """Two agents of torchrun on this machine: one worker is killed, the job goes on from its last checkpoint itself."""
    run = demo.parent / "lost"
    command = [*SHORT, "--data", demo / "train.txt", "--out", run, "--workers", 0, "--save-every", 1]
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
                                "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29517", "--rdzv_id=lost",
                                "--max-restarts=2", HERE / "pretrain.py", *map(str, command)],
                               env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
              for _ in range(2)]
    assert wait_for(lambda: (run / "log.jsonl").exists() and cmaev.read_log(run), agents[0], 240)
    workers = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert [agent.wait(600) for agent in agents] == [0, 0]
    same_but_for_rounding(run, undisturbed)


@pytest.mark.skipif(not LONG, reason="takes minutes: LONG=1 pytest -k faults")
def test_faults_long_run_stays_flat(demo, spoilt):
    """2,000 steps on good and bad videos: memory, open files and processes of the trainer and its workers."""
    run = demo.parent / "flat"
    command = [*SHORT, "--data", demo.parent / "mixed.txt", "--out", run, "--bad-share", 1, "--workers", 2,
               "--batch-size", 2, "--epochs", 10, "--frames", 2, "--size", 16, "--patch", 4, "--save-every", 500]
    process, rows, log = start("pretrain.py", *command), [], run / "log.jsonl"
    for step in range(200, 2001, 200):
        assert wait_for(lambda: log.exists() and f'"step": {step},' in log.read_text(), process, 600), (
            process.stderr.read())
        pids = [str(process.pid), *subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                                  text=True).stdout.split()]
        rows.append((step, round(sum(map(resident, pids))), sum(map(open_files, pids)), len(pids)))
        print(*rows[-1])
    process.kill()
    bad = bad_videos_of(run)
    print(f"{len(bad)} bad videos, {cmaev.read_log(run)[-1]['bad_clips']} samples replaced")
    _, memory, files, processes = zip(*rows)
    assert memory[-1] < 1.03 * memory[1] and len(set(processes)) == 1
    assert np.mean(files[5:]) < np.mean(files[:5]) + 5  # those of samples on their way come and go


@pytest.mark.skipif(not LONG, reason="takes minutes: LONG=1 pytest -k faults")
def test_faults_reading_stays_flat(demo, spoilt):
    """20,000 samples of good and bad videos read in one process, as a worker reads them in weeks."""
    clips, memory = clips_of(demo), []
    clips.videos = cmaev.read_list(demo.parent / "mixed.txt")
    opened = open_files()
    for i in range(20_000):
        if i % 5_000 == 0:
            memory.append(round(resident()))
        clips[divmod(i, len(clips))]
    memory.append(round(resident()))
    print(f"memory {memory} MiB, open files {opened} and {open_files()}")
    assert memory[-1] - memory[1] < 15 and open_files() == opened


# ---------------------------------------------------------------------------------------------------------------------
# A GPU: GPU=1 pytest -k gpu
# ---------------------------------------------------------------------------------------------------------------------


class PretendedGPU(FakeTensorMode):
    """Tensors on the CPU are real. Those on the GPU have shapes and no values: whatever asks for one, as .item() and
    boolean indexing do, is an error, and so is work on tensors of both."""

    def dispatch(self, operation, types, args=(), kwargs=None):
        of_gpu = lambda x: isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda"
        if any(map(of_gpu, tree_leaves((args, kwargs)))):
            return super().dispatch(operation, types, args, kwargs)
        with unset_fake_temporarily():
            return operation(*args, **(kwargs or {}))


class TwoBatches(cmaev.Feed):
    """A feed of two batches, read on the CPU, and put on the pretended GPU as Feed puts them on a GPU."""

    def __init__(self, batches, device):
        super().__init__(batches, torch.device("cpu"))
        self.gpu, self.left = device, 2

    def __next__(self):
        if not self.left:
            raise KeyboardInterrupt  # the scripts end with 130
        self.left -= 1
        return {name: x if name == "mask" else x.to(self.gpu) for name, x in super().__next__().items()}


def empty_gradients(loss, *_, **__):
    """In place of backward(), which wants a GPU's own threads: an empty gradient for each weight that the loss has."""
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += {following for following, _ in node.next_functions if following} - set(nodes)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.8 wants a driver for this, 2.11 none")
@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set")
@pytest.mark.parametrize("script, more", [
    ("pretrain", "--amp bf16"), ("pretrain", "--amp fp16 --clip-grad 1"), ("pretrain", "--contrast-weight 0"),
    ("pretrain", "--amp bf16 --encoder convvit_tiny --repeats 2"), ("finetune", "--amp bf16 --mixup 0 --cutmix 0"),
    ("finetune", "--amp fp16 --encoder convvit_tiny --mixup 0 --cutmix 0")])
def test_steps_wait_for_no_device_and_mix_none(demo, tmp_path, monkeypatch, script, more):
    """Steps 2 and 3 of the scripts themselves, without mixup: pretended tensors cannot become torchvision's subclass.

    Backward passes: test_gpu_step_never_waits_for_the_device, on a GPU.
    """
    device, updates, feed, backward = torch.device("cuda", 0), [], cmaev.Feed, torch.Tensor.backward
    monkeypatch.setattr(cmaev, "join_ranks", lambda: (0, 1, device))
    monkeypatch.setattr(cmaev, "Feed", TwoBatches)
    monkeypatch.setattr(torch.Tensor, "backward", empty_gradients)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    adamw = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: updates.append(0) or adamw(optimizer))
    settings, run = (SHORT, run_pretrain) if script == "pretrain" else ([*TUNE, "--init", "none"], run_finetune)
    settings = [*settings, "--data", demo / "train.txt", "--val", demo / "val.txt", "--out", tmp_path / "run",
                "--workers", 0, "--log-every", 100, "--save-every", 100, *more.split()]
    with monkeypatch.context() as first:  # the first step is logged
        first.setattr(cmaev, "join_ranks", lambda: (0, 1, torch.device("cpu")))
        first.setattr(cmaev, "notice_signals", lambda: lambda: signal.SIGTERM)
        first.setattr(cmaev, "Feed", feed)
        first.setattr(torch.Tensor, "backward", backward)
        assert run(*settings) == str(cmaev.SAVED_AND_STOPPED)
    updates.clear()
    with PretendedGPU(allow_non_fake_inputs=True):
        ended = run(*settings)
    assert ended == "130" and len(updates) == 2


DEVICE = torch.device("cuda")
on_gpu = pytest.mark.skipif(not GPU, reason="wants a GPU: GPU=1 pytest -k gpu")


@on_gpu
@pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
def test_gpu_losses_and_gradients_are_the_cpus(encoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    model, (online, target, mask) = tiny(encoder)
    losses = model(online, target, mask)
    losses["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.to(DEVICE)
    on_device = model(online.to(DEVICE), target.to(DEVICE), mask)
    on_device["loss"].backward()
    for name, value in losses.items():
        assert on_device[name].item() == pytest.approx(value.item(), rel=1e-4)
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")


@on_gpu
def test_gpu_feed_brings_the_same_batches(demo):
    clips = clips_of(demo, repeats=2)
    load = lambda device: cmaev.Feed(cmaev.loader(clips, 2, device, batch_sampler=cmaev.batches(
        len(clips), 4, 12, 0)), device)
    plain, feed = load(torch.device("cpu")), load(DEVICE)
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(12):
        expected, batch = next(plain), next(feed)
        for _ in range(10):
            busy = (busy @ busy).tanh()  # the copies run beside this
        for name, x in expected.items():
            assert batch[name].is_cuda == (name != "mask") and torch.equal(batch[name].cpu(), x), name
    torch.cuda.synchronize()
    assert 0 <= feed.waited() < 60


@on_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
def test_gpu_step_never_waits_for_the_device(demo, encoder, dtype):
    torch.manual_seed(0)
    clips = clips_of(demo)
    model = cmaev.CMAEV(encoder, **TINY).to(DEVICE)
    optimizer = torch.optim.AdamW(cmaev.decay_groups(model, 0.05), lr=1e-4, fused=True)
    scaler, meter = cmaev.grad_scaler(dtype, DEVICE), cmaev.Meter(["loss"], DEVICE)
    feed = cmaev.Feed(cmaev.loader(clips, 0, DEVICE, batch_sampler=cmaev.batches(len(clips), 4, 8, 0)), DEVICE)
    losses = []
    try:
        for step in range(8):
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")  # memory and kernels are there by then
            batch = next(feed)
            target = cmaev.normalize(cmaev.augment_colors(batch["target"], batch["colors"]))
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(cmaev.normalize(batch["online"]), target, batch["mask"])["loss"]
            grad_norm = cmaev.optimizer_step(loss, model.parameters(), optimizer, scaler, dtype, 1.0)
            meter.add([loss.detach()], grad_norm, batch["replaced"])
            model.update_target(0.99)
            losses.append(loss.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and meter.read(8, 4, 2, 1)["skipped_steps"] == 0


@on_gpu
@pytest.mark.parametrize("more", ["--amp bf16", "--amp fp16", "--amp bf16 --compile",
                                  "--amp none --encoder convvit_tiny"])
def test_gpu_trains_resumes_and_fine_tunes(demo, tmp_path, monkeypatch, more):
    command = [*SHORT, "--data", demo / "train.txt", "--out", tmp_path / "run", "--workers", 2, *more.split()]
    update, calls = cmaev.CMAEV.update_target, []

    def stop_at_ten(self, momentum):
        update(self, momentum)
        calls.append(0)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(cmaev.CMAEV, "update_target", stop_at_ten)
    assert run_pretrain(*command) == str(cmaev.SAVED_AND_STOPPED)
    assert run_pretrain(*command) is None
    log = cmaev.read_log(tmp_path / "run")
    assert log[-1]["step"] == 20 and log[-1]["skipped_steps"] == 0 and log[-1]["loss"] < log[0]["loss"]
    assert all(0 <= line["data_wait"] < 1 and line["memory_mib"] > 0 for line in log)
    encoder = more.split("--encoder ")[1:] or ["vit_tiny"]
    lists = ["--data", demo / "train.txt", "--val", demo / "val.txt", "--init", tmp_path / "run", "--encoder", *encoder]
    for how in (["--out", tmp_path / "tuned"], ["--probe", "linear"]):
        assert run_finetune(*TUNE, *lists, *how, "--amp", more.split()[1], "--workers", 2) is None


if __name__ == "__main__":
    shared = Path(sys.argv[1])
    if os.environ["WORLD_SIZE"] == "2":
        as_rank(shared)
    score_as_rank(shared)
