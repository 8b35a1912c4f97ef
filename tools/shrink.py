"""Writes a small copy of videos to train on: python -m tools.shrink list.txt copy --side 170 --keyframes 12

The first argument is a list or a folder, as for --data. Each video, also a folder of frames, becomes an H.264
file in copy/ with the same frames, at the same path below the videos' common folder. The list beside them has
the labels (list.txt for a folder). Smaller pictures are not enlarged. Variable frame rates keep their times;
folders of frames, and files without rising times, get a constant rate. The same command goes on where it was
stopped.

A crop has at least 0.66 of the short side: from side 170 it has 112 pixels. Side 128 is smaller and faster, but
its smaller crops are enlarged.
"""

import functools
import io
import itertools
import json
import math
import os
import time
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import cmaev

import av
import numpy as np
from torch.utils.data import DataLoader

# Fast to read: no CABAC, no deblocking, one reference. Three of four frames are not referred to: Video skips them
# unless they are wanted. The same file every time: see demo_videos.write_video.
X264 = {"preset": "veryfast", "tune": "fastdecode", "crf": "20", "x264-params":
        "threads=1:sync-lookahead=0:mbtree=0:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none"}


def encode(path, side, keyframes):
    """A video -> (its copy's bytes, the frames' times in seconds after the first, Fractions)."""
    video, rate = cmaev.Video(path), Fraction(24)
    video.deadline = math.inf  # a film takes longer than a sample
    if video.images:
        images, times = map(cmaev.read_image, video.images), [None]
    else:
        images = map(video._to_rgb, video._decode_from_start())
        times = video.times or [frame.pts for frame in video._decode_from_start()]
        rate, base = video.stream.average_rate or rate, video.stream.time_base
    if None in times or any(a >= b for a, b in zip(times, times[1:])):
        times, base = list(range(len(video))), 1 / rate
    file, stream = io.BytesIO(), None
    with av.open(file, "w", format="mp4") as container:
        for pts, image in itertools.zip_longest(times, images):
            if pts is None or image is None:
                raise ValueError(f"other than {len(times)} frames can be decoded: damaged?")
            if stream is None:
                shape, short = image.shape, min(image.shape[:2])
                even = min(side, short) // 2 * 2
                height, width = (min(x // 2 * 2, 2 * round(x * even / short / 2)) for x in shape[:2])
                stream = container.add_stream("libx264", rate=rate, width=width, height=height,
                                              options=X264 | {"g": str(keyframes)})
                stream.time_base = stream.codec_context.time_base = base
                stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, limited
            if image.shape != shape:
                raise ValueError("its frames have different sizes")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24").reformat(
                width, height, "yuv420p", dst_colorspace="ITU601", interpolation="BICUBIC", threads=1)
            frame.pts, frame.time_base = pts - times[0], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getbuffer(), [(pts - times[0]) * base for pts in times]


def write_copy(task, side, keyframes):
    """Writes the copy of one video, `task` = (path, target) -> None, or why it cannot be read, a line."""
    path, target = task
    try:
        with cmaev.bad_video(path, "shrunk"):
            data, times = encode(path, side, keyframes)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with cmaev.atomic_write(target, "wb") as file:
            file.write(data)
            file.flush()
            copy = cmaev.Video(f"{target}.partial")
            shown = copy.times or [frame.pts for frame in copy._decode_from_start()]
            if [(pts - shown[0]) * copy.stream.time_base for pts in shown] != times:
                raise cmaev.BadVideo(f"{path}: cannot be shrunk: its copy has other frames or times")
    except cmaev.BadVideo as error:
        return cmaev.last_line(error)


def name_copies(source, videos):
    """The videos' common folder, and {path of a video: name of its copy, below copy/}."""
    paths = {path: os.path.abspath(path) for path, _ in videos}
    folders = [os.path.dirname(path) for path in paths.values()]
    if os.path.isdir(source):
        folders.append(os.path.abspath(source))  # which may have one class alone
    root, names, owners = os.path.commonpath(folders), {}, {}
    for path, absolute in paths.items():
        name = os.path.relpath(absolute, root)
        names[path] = name if name.lower().endswith(".mp4") else f"{name}.mp4"
        if owners.setdefault(names[path], absolute) != absolute:
            raise cmaev.CMAEVError(f"{owners[names[path]]} and {path} would both become {names[path]}: "
                                   "rename one")
    return root, names


def open_copy(copy, source, paths, settings):
    """Makes the folder or checks that it has these settings. Raises CMAEVError where originals lie in it."""
    def forbid(path, folder):
        if Path(path).resolve().is_relative_to(Path(folder).resolve()):
            raise cmaev.CMAEVError(f"{path} lies in {folder}: keep copies and originals apart")
    for folder in {os.path.dirname(os.path.abspath(path)) for path in (source, *paths)}:
        forbid(folder, copy)
    if os.path.isdir(source):
        forbid(copy, source)
    os.makedirs(copy, exist_ok=True)
    record = Path(copy, "settings.json")
    if not record.exists():
        if os.listdir(copy):
            raise cmaev.CMAEVError(f"{copy} holds other files: give a new folder")
        with cmaev.atomic_write(record) as file:
            json.dump(settings, file)
    cmaev.lock_run(copy)
    first = cmaev.parse_json(record.read_text(), record, *settings)
    if first != settings:
        raise cmaev.CMAEVError(f"{copy} was begun with {first}, not {settings}: give the same, or a new "
                               "folder")


def main():
    parser = cmaev.argument_parser(__doc__)
    parser.add_argument("source", help="list or folder of videos")
    parser.add_argument("copy", help="folder for the copies and their list")
    parser.add_argument("--side", type=cmaev.number(int, "[2, inf)"), default=170, help="pixels of the short side")
    parser.add_argument("--keyframes", type=cmaev.COUNT, default=12, help="frames from one to the next")
    s = parser.parse_args()
    videos = cmaev.read_list(s.source)
    root, names = name_copies(s.source, videos)
    open_copy(s.copy, s.source, names, dict(side=s.side, keyframes=s.keyframes, originals=root))
    tasks = {name: path for path, name in names.items()}  # a video may be listed twice
    total = len(tasks)
    tasks = [(path, f"{s.copy}/{name}") for name, path in tasks.items()]
    tasks = [task for task in tasks if not os.path.exists(task[1])]
    there, workers = total - len(tasks), min(len(os.sched_getaffinity(0)), len(tasks))
    print(f"{total} videos, {there} of them copied already; processes: {workers}", flush=True)
    work = DataLoader(tasks, None, num_workers=workers, worker_init_fn=cmaev.ignore_signals, in_order=False,
                      collate_fn=functools.partial(write_copy, side=s.side, keyframes=s.keyframes))
    done = bad = 0
    began = shown = time.monotonic()
    try:
        for done, reason in enumerate(work, 1):
            if reason:
                bad += 1
                print(reason, flush=True)
            if time.monotonic() > shown + 10 or done == len(tasks):
                shown = time.monotonic()
                left = timedelta(seconds=round((shown - began) * (len(tasks) / done - 1)))
                print(f"{there + done}/{total} videos, {bad} bad, {left} left", flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {there + done} of {total} videos: the same command goes on")
        raise
    except RuntimeError as error:  # torch's, for a worker that was killed
        raise cmaev.CMAEVError(f"{cmaev.last_line(error)} The same command goes on") from None
    lines = [names[path] if label is None else f"{names[path]} {label}" for path, label in videos
             if os.path.exists(f"{s.copy}/{names[path]}")]
    if not lines:
        raise cmaev.CMAEVError(f"{s.source}: none of its videos can be read")
    listed = f"{s.copy}/{'list.txt' if os.path.isdir(s.source) else os.path.basename(s.source)}"
    with cmaev.atomic_write(listed) as file:
        file.writelines(f"{line}\n" for line in lines)
    print(f"{listed}: {len(lines)} videos{f'; {bad} left out, which cannot be read' if bad else ''}")


if __name__ == "__main__":
    cmaev.run_script(main)
