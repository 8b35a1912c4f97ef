"""Measures which frames common video readers return for index i, in 26 kinds of file, and at what cost.

    python -m experiments.readers              hours; writes experiments/readers.md (Linux on x86-64)

The truth is a decode from the start by PyAV's FFmpeg, on one thread. Each reader has a process of its own.
Packages, files and cells stay in runs/readers, where a second call goes on; delete the folder to begin anew.
"""

import json
import os
import random
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median

import av

from experiments.numbered_videos import decode_all, look, make_files

WORK = Path("runs/readers")
SECONDS = {"frames": 4, "time": 60}  # length of each table's files
ROUNDS, CLIPS = 4, 6  # each clip is timed in each round
TOLERANCE = 6  # grey levels
PYAV_LIBS, LINKS = Path(av.__file__).parents[1] / "av.libs", WORK.absolute() / "ffmpeg"

# The readers: a path -> functions that count the frames, read a list of indices, and close the file --------

def read_cmaev(path):
    import cmaev
    video = cmaev.Video(path)
    return video.__len__, video.read, lambda: None


def read_torchcodec(path, mode):
    from torchcodec.decoders import VideoDecoder
    video = VideoDecoder(path, seek_mode=mode, dimension_order="NHWC", num_ffmpeg_threads=1)
    return video.__len__, lambda indices: video.get_frames_at(indices).data, lambda: None


def read_decord(path):
    import decord
    video = decord.VideoReader(path, num_threads=1)
    return video.__len__, lambda indices: video.get_batch(indices).asnumpy(), lambda: None


def read_opencv(path):
    import cv2
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    following = 0

    def read(i):
        nonlocal following
        if not following <= i < following + 32:
            video.set(cv2.CAP_PROP_POS_FRAMES, i)
            following = i
        for _ in range(following, i):
            video.grab()
        following = i + 1
        return video.read()[1][:, :, ::-1]

    return lambda: int(video.get(cv2.CAP_PROP_FRAME_COUNT)), each(read), video.release


def read_imageio_ffmpeg(path):
    import imageio.v2
    video = imageio.v2.get_reader(path, "ffmpeg", input_params=["-threads", "1"])
    return video.count_frames, each(video.get_data), video.close


def read_imageio_pyav(path, constant):
    import imageio.v3
    video = imageio.v3.imopen(path, "r", plugin="pyav")
    read = each(lambda i: video.read(index=i, thread_count=1, constant_framerate=constant))
    return lambda: video.properties().shape[0], read, video.close


def read_moviepy(path):
    from moviepy import VideoFileClip
    video = VideoFileClip(path, audio=False)
    return lambda: video.n_frames, each(lambda i: video.get_frame(i / video.fps)), video.close


def read_video_reader(path):
    from video_reader import PyVideoReader
    video = PyVideoReader(path, threads=1)
    return video.count_actual_frames, video.get_batch, lambda: None


def read_pims(path):
    import pims
    video = pims.Video(path)
    return video.__len__, each(video.__getitem__), video.close


def read_pyav(path):
    """The usual loop: seek to the time of index i at the average rate, then decode up to it."""
    container = av.open(path)
    stream = container.streams.video[0]
    stream.thread_count = 1
    frames, following = None, float("inf")

    def read(i):
        nonlocal frames, following
        time = (stream.start_time or 0) + int(i / stream.average_rate / stream.time_base)
        if not following <= i < following + 32:
            container.seek(time, stream=stream)
            frames = container.decode(stream)
        following = i + 1
        return next(frame for frame in frames if frame.pts >= time).to_ndarray(format="rgb24")

    count = lambda: stream.frames or int(container.duration / av.time_base * stream.average_rate)
    return count, each(read), container.close


def each(read):
    return lambda indices: [read(i) for i in indices]


IMAGEIO = "imageio==2.38.1 imageio-ffmpeg==0.8.1 pillow==11.3.0"
READERS = {  # name: (packages, function)
    "this project": ("", read_cmaev),
    "torchcodec, exact": ("torchcodec==0.17.0", partial(read_torchcodec, mode="exact")),
    "torchcodec, approximate": ("torchcodec==0.17.0", partial(read_torchcodec, mode="approximate")),
    "decord": ("decord==0.6.0", read_decord),
    "eva-decord": ("eva-decord==0.6.1", read_decord),
    "decord2": ("decord2==3.4.0", read_decord),
    "OpenCV 4": ("opencv-python-headless==4.14.0.94", read_opencv),
    "OpenCV 5": ("opencv-python-headless==5.0.0.93", read_opencv),
    "imageio, FFMPEG": (IMAGEIO, read_imageio_ffmpeg),
    "imageio, pyav": (IMAGEIO, partial(read_imageio_pyav, constant=None)),
    "imageio, pyav, variable rate": (IMAGEIO, partial(read_imageio_pyav, constant=False)),
    "moviepy": (f"moviepy==2.2.1 {IMAGEIO} decorator==5.3.1 proglog==0.1.12 python-dotenv==1.2.4 "
                "tqdm==4.70.1", read_moviepy),
    "video-reader-rs": ("video-reader-rs==0.4.5", read_video_reader),
    "pims": (f"pims==0.7 {IMAGEIO} slicerator==1.1.0 tifffile==2026.3.3 packaging==26.4", read_pims),
    "PyAV, seek and decode": ("", read_pyav)}

# The measurements, each in a process of its own ------------------------------------------------------------

def read_all(open_file, path, frames):
    """Looks at each index, read alone: in random order, then, with the file opened again, in rising order."""
    passes = []
    for shuffled in (True, False):
        count, read, close = open_file(path)
        length, seen = int(count()), {}
        asked = range(length or int(frames))  # counts 0: try all frames
        for i in random.Random(0).sample(asked, len(asked)) if shuffled else asked:
            try:
                seen[i] = look(read([i])[0])
            except Exception as problem:
                seen[i] = type(problem).__name__, None, None
        passes.append([seen[i] for i in asked])
        close()
    return length, *passes


def processor_time():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def read_clips(open_file, path, frames):
    """Opens, reads 16 frames, 4 apart, closes; times that -> [(processor time in ms, right)]."""
    truth, results = json.loads(frames), []
    for clip in range(1 + CLIPS):
        start = random.Random(clip).randrange(len(truth) - 60)
        indices = list(range(start, start + 64, 4))
        began = processor_time()
        _, read, close = open_file(path)
        images = list(read(indices))
        close()
        spent = processor_time() - began
        results.append((1000 * spent, [look(image)[0] for image in images] == [truth[i] for i in indices]))
    return results[1:]  # the first one warms up


def ask(name, task, path, *arguments):
    """The answer of a task in a process with the reader's packages, or the name of what went wrong."""
    requirements, _ = READERS[name]
    folder = WORK.absolute() / (requirements.split() or ["none"])[0]
    libraries = ":".join(map(str, [*folder.glob("*.libs"), LINKS, PYAV_LIBS]))  # *.libs: video-reader-rs's
    environment = dict(os.environ, PYTHONPATH=str(folder), LD_LIBRARY_PATH=libraries, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "experiments.readers", name, task, str(path), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    return "crashes" if process.returncode else json.loads(process.stdout.splitlines()[-1])


def answer(name, task, *arguments):
    try:
        result = {"read_all": read_all, "read_clips": read_clips}[task](READERS[name][1], *arguments)
    except Exception as error:
        result = type(error).__name__
    print("\n" + json.dumps(result))


def install():
    """Installs packages; links the FFmpeg libraries of PyAV's wheel, for torchcodec; -> FFmpeg's command."""
    for requirements in {requirements for requirements, _ in READERS.values() if requirements}:
        folder = WORK / requirements.split()[0]
        if not folder.exists():
            subprocess.run([sys.executable, *"-m pip install -q --no-deps --target".split(), f"{folder}.part",
                            *requirements.split()], check=True)
            os.rename(f"{folder}.part", folder)
    LINKS.mkdir(exist_ok=True)
    for path in PYAV_LIBS.glob("lib[as][vw]*"):
        link = LINKS / re.sub(r"-[0-9a-f]+(\.so\.\d+).*", r"\1", path.name)  # libavcodec.so.62
        if not link.is_symlink():
            link.symlink_to(path)
    return next(WORK.glob("imageio==*/imageio_ffmpeg/binaries/ffmpeg-*"))


# The tables ------------------------------------------------------------------------------------------------

def frames_cell(result, truth):
    if isinstance(result, str):
        return result
    length, shuffled, rising = result
    numbers, again = ([number for number, _, _ in seen] for seen in (shuffled, rising))
    looks = [(turn, error) for _, turn, error in shuffled + rising if turn is not None] or [(0, 0)]
    turn, error = map(median, zip(*looks))
    wrong = sum(number != true for number, true in zip(numbers, truth + [-1] * len(numbers)))
    cell = f"{length} / {wrong}" + " o" * (numbers != again) + " c" * (error > TOLERANCE) + " r" * (turn > 0)
    return f"**{cell}**" if cell == f"{len(truth)} / 0" else cell


def time_row(path, names):
    """-> {name: median over clips of a clip's least processor time in ms}; the readers take turns."""
    rounds, truth = {name: [] for name in names}, json.dumps(decode_all(path))
    for _ in range(ROUNDS):
        for name in names:
            result = ask(name, "read_clips", path, truth)
            rounds[name].append([(0, False)] if isinstance(result, str) else result)
    times = {name: median(min(ms for ms, _ in clip) for clip in zip(*rounds[name]))
             for name in names if all(right for clips in rounds[name] for _, right in clips)}
    cells = {name: f"{time:.1f}" for name, time in times.items()}
    if times:
        fastest = min(times, key=times.get)
        cells[fastest] = f"**{cells[fastest]}**"
    return {name: cells.get(name, "wrong") for name in names}


def table(rows):
    lines = [f"| file | {' | '.join(READERS)} |", "|---" * (len(READERS) + 1) + "|"]
    for kind, row in rows.items():
        lines.append(f"| {kind} | {' | '.join(row.get(name, '') for name in READERS)} |")
    return "\n".join(lines)


TEXT = """# Which frame does a reader return for index i?

`python -m experiments.readers` makes the files, of numbered frames, and this page.

## Frames

A cell: the number of frames that the reader counts / the number of indices for which it returns no frame or a
wrong one. The truth is PyAV's decode from the start. The reader is asked for every index that it counts (for all, if
it counts none), one at a time, in random order. `o`: in rising order it returns other frames; `c`: in the median
frame, a colour is more than {tolerance} grey levels off what the tags say; `r`: not upright. Bold: all right. A name:
the error. "cut by stream copy": `ffmpeg -ss ... -c copy`.

{frames}

## Processor time

Milliseconds to open a file of {seconds} s, read 16 frames, every fourth from a random one on, and close it, on
one thread where the reader can. Medians of {clips} clips. A clip's time is the least of {rounds} rounds, in which
the readers take turns. Empty: not bold above. `wrong`: other frames here, or an error. Bold: the least.

{time}

Packages: {packages}; PyAV {pyav}.
torchcodec uses the FFmpeg {ffmpeg} of PyAV's wheel. imageio-ffmpeg's FFmpeg makes the files.
"""


def main():
    ffmpeg, file = install(), WORK / "cells.json"
    cells = json.loads(file.read_text()) if file.exists() else {"frames": {}, "time": {}}
    packages = {package for requirements, _ in READERS.values() for package in requirements.split()}
    for name, seconds in SECONDS.items():
        for kind, path in make_files(WORK / name, seconds, ffmpeg).items():
            if kind not in cells[name] and name == "frames":
                truth = decode_all(path)
                cells[name][kind] = {reader: frames_cell(ask(reader, "read_all", path, len(truth)), truth)
                                     for reader in READERS}
            elif kind not in cells[name]:
                right = [reader for reader, cell in cells["frames"][kind].items() if cell.startswith("**")]
                cells[name][kind] = time_row(path, right)
            print(name, kind, cells[name][kind], flush=True)
            file.write_text(json.dumps(cells))
            Path("experiments/readers.md").write_text(TEXT.format(
                frames=table(cells["frames"]), time=table(cells["time"]), tolerance=TOLERANCE,
                seconds=SECONDS["time"], rounds=ROUNDS, clips=CLIPS, packages=", ".join(sorted(packages)),
                pyav=av.__version__, ffmpeg=av.ffmpeg_version_info))


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else answer(*sys.argv[1:])
