"""Makes videos of numbered frames, in 26 kinds of file that people have, for experiments/readers.py.

Every frame shows its number as three rows of 12 blocks (a fixed pattern, the number's bits, their inverse),
which survive codecs and scaling, and a row of six known colours.
"""

import random
import re
import subprocess

import av
import numpy as np

WIDTH, HEIGHT, FPS = 340, 256, 25
COLORS = ((190, 60, 50), (60, 160, 70), (60, 80, 180), (190, 170, 70), (128, 128, 128), (170, 90, 160))
PATTERN = (1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1)
LEFT, TOP, BLOCK, PATCH_TOP, PATCH = 26, 20, 24, 120, 48
PLAIN = "-vf scale=out_color_matrix=bt601:out_range=tv,format={},setparams=colorspace=unknown:range=unknown"
TAGGED = "-vf scale=out_color_matrix={0}:out_range={1},format={2},setparams=colorspace={0}:range={1}"
YUV420, X264 = PLAIN.format("yuv420p"), "-c:v libx264 -g {group}"


def damage(data, path):
    """Overwrites the middle of one packet in the middle of the file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    packet = packets[len(packets) // 2 + 7]
    third = packet.size // 3
    at = packet.pos + third
    return data[:at] + random.Random(0).randbytes(third) + data[at + third:]


KINDS = {  # name: (suffix, FFmpeg's options, what is done to the bytes)
    "mp4, H.264, closed groups": ("mp4", f"{YUV420} {X264}"),
    "mp4, H.264, open groups": ("mp4", f"{YUV420} {X264} -x264-params open-gop=1"),
    "mp4, closed groups, cut by stream copy": (
        "mp4", "-ss {start} -i {folder}/mp4-H-264-closed-groups.mp4 -c copy"),
    "mp4, open groups, cut by stream copy": (
        "mp4", "-ss {start} -i {folder}/mp4-H-264-open-groups.mp4 -c copy"),
    "mp4, fragmented": ("mp4", f"{YUV420} {X264} -movflags frag_keyframe+empty_moov+default_base_moof"),
    "mp4, variable rate": (
        "mp4", f"{YUV420},settb=1/90000,select='lt(mod(n,40),29)',setpts='PTS+600*mod(N*N,7)' {X264} "
        "-fps_mode passthrough -enc_time_base 1/90000"),
    "mp4, rotated": (
        "mp4", f"-noautorotate -display_rotation 90 -i {{folder}}/source.mkv {YUV420},transpose=clock {X264}"),
    "mp4, HEVC, 10 bit": (
        "mp4", PLAIN.format("yuv420p10le") + " -c:v libx265 -x265-params log-level=0 -tag:v hvc1 -g {group}"),
    "mp4, tagged BT.709": (
        "mp4", TAGGED.format("bt709", "tv", "yuv420p") + f":color_primaries=bt709:color_trc=bt709 {X264}"),
    "mp4, tagged BT.2020, 10 bit": (
        "mp4", TAGGED.format("bt2020nc", "tv", "yuv420p10le") + ":color_primaries=bt2020:color_trc=bt2020-10 "
        f"{X264}"),
    "mp4, full range": ("mp4", f"{TAGGED.format('smpte170m', 'pc', 'yuv420p')} {X264}"),
    "mp4, two video streams": (
        "mp4", "-filter_complex split[c][d];[c]scale=170:128,format=yuv420p[a];[d]trim=start_frame=30,"
        f"setpts=PTS-STARTPTS,format=yuv420p[b] -map [a] -map [b] {X264}"),
    "mp4, sound starts earlier": (
        "mp4", f"-f lavfi -t 2 -i sine -map 0 -map 1 {YUV420},setpts=PTS+0.5/TB {X264}"),
    "mp4, one damaged packet": ("mp4", f"{YUV420} {X264}", damage),
    "mp4, truncated": (
        "mp4", f"{YUV420} {X264} -movflags faststart", lambda data, path: data[:len(data) * 3 // 5]),
    "mkv, H.264 with B-frames": ("mkv", f"{YUV420} {X264} -bf 3"),
    "webm, VP9, alternate references": (
        "webm", f"{YUV420} -c:v libvpx-vp9 -b:v 600k -cpu-used 5 -auto-alt-ref 6 -lag-in-frames 25 "
        "-g {group}"),
    "mp4, AV1 of SVT": ("mp4", f"{YUV420} -c:v libsvtav1 -preset 9 -crf 35 -g {{group}}"),
    "mkv, AV1 of aom": ("mkv", f"{YUV420} -c:v libaom-av1 -cpu-used 8 -crf 35 -g {{group}}"),
    "AVI, XviD, packed": ("avi", f"{YUV420} -c:v libxvid -bf 2 -q:v 3 -bsf:v setts=ts=N -g {{group}}"),
    "AVI, XviD, unpacked": (
        "avi", "-i {folder}/AVI-XviD-packed.avi -c copy -bsf:v mpeg4_unpack_bframes,setts=ts=N"),
    "AVI, H.264": ("avi", f"{YUV420} {X264} -bf 3"),
    "AVI, MJPEG": ("avi", "-vf scale=out_color_matrix=bt601:out_range=pc,format=yuvj420p -c:v mjpeg -q:v 3"),
    "mov, ProRes": ("mov", f"{PLAIN.format('yuv422p10le')} -c:v prores_ks"),
    "MPEG-TS, begins inside a group": (
        "ts", f"{YUV420} {X264}", lambda data, path: data[len(data) // 20 // 188 * 188:]),
    "GIF": ("gif", "")}


def make_files(folder, seconds, ffmpeg):
    """-> {kind: path} of the files, which the command `ffmpeg` makes where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    ffmpeg, paths = [ffmpeg, "-y", "-loglevel", "error"], {}
    if not (folder / "source.mkv").exists():
        make_source(folder, seconds * FPS, ffmpeg)
    for kind, (suffix, options, *change) in KINDS.items():
        path, part = folder / f"{re.sub('[^A-Za-z0-9]+', '-', kind)}.{suffix}", folder / f"part.{suffix}"
        if not path.exists():
            options = options if "-i {" in options else "-i {folder}/source.mkv " + options
            options = options.format(folder=folder, group=seconds * FPS // 6, start=0.21 * seconds)
            subprocess.run([*ffmpeg, *options.split(), "-threads", "1", part], check=True)
            for changed in change:
                part.write_bytes(changed(part.read_bytes(), part))
            part.rename(path)
        paths[kind] = path
    return paths


def make_source(folder, frames, ffmpeg):
    """A texture that moves, with numbers and colours on it, without loss."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(40, 216, (40, 50, 3)), np.ones((8, 8, 1)))
    texture += rng.normal(0, 4, texture.shape)
    options = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i - -c:v ffv1 -pix_fmt bgr0"
    pipe = subprocess.Popen([*ffmpeg, *options.split(), folder / "part.mkv"], stdin=subprocess.PIPE)
    for number in range(frames):
        image = np.roll(texture, (number, 2 * number), (0, 1))[:HEIGHT, :WIDTH].copy()
        bits = [number >> bit & 1 for bit in range(12)]
        blocks = np.kron([PATTERN, bits, [1 - bit for bit in bits]], np.ones((BLOCK, BLOCK)))
        image[TOP:TOP + 3 * BLOCK, LEFT:LEFT + 12 * BLOCK] = 30 + 195 * blocks[:, :, None]
        for i, color in enumerate(COLORS):
            image[PATCH_TOP:PATCH_TOP + PATCH, LEFT + i * PATCH:LEFT + (i + 1) * PATCH] = color
        pipe.stdin.write(image.clip(0, 255).astype(np.uint8).tobytes())
    pipe.communicate()
    (folder / "part.mkv").rename(folder / "source.mkv")


def middles(image, top, size, rows, columns):
    """The mean colours of the middles of square blocks, in an image of any size: [rows, columns, 3]."""
    y, x = len(image) / HEIGHT, image.shape[1] / WIDTH
    near, far = 0.3 * size, 0.7 * size
    return np.array([[image[round(y * (t + near)):round(y * (t + far)),
                            round(x * (l + near)):round(x * (l + far))].mean((0, 1))
                      for l in LEFT + size * np.arange(columns)] for t in top + size * np.arange(rows)])


def look(image):
    """-> (number, quarter turns that make it readable, largest error of a colour), or (None, None, None)."""
    for turn in range(4):
        turned = np.rot90(np.asarray(image), turn)
        pattern, bits, inverse = middles(turned, TOP, BLOCK, 3, 12).mean(-1) > 128
        if tuple(pattern) == PATTERN and (bits != inverse).all():
            error = abs(middles(turned, PATCH_TOP, PATCH, 1, len(COLORS))[0] - COLORS).max()
            return int(bits @ 2 ** np.arange(12)), turn, float(error)
    return None, None, None


def decode_all(path):
    """The numbers of the frames that FFmpeg shows, decoded from the start."""
    numbers = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_count = 1  # what FFmpeg shows of a damaged packet depends on it
        for packet in container.demux(stream):
            try:
                numbers += [look(frame.to_ndarray(format="rgb24"))[0] for frame in packet.decode()]
            except av.error.FFmpegError:
                pass
    return numbers
