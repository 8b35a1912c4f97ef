"""Writes labelled videos of moving shapes, as the demo uses them: python -m tools.demo_videos folder [--kind scenes]."""

import functools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cmaev

import av
import numpy as np

DEMO_CLASSES = ("left", "right", "up", "down", "clockwise", "counterclockwise", "growing", "shrinking",
                "swinging", "bobbing")
DEMO_SHAPES = ("disk", "square", "ring", "cross", "triangle")
DEMO_FRAMES, DEMO_SIDE = 48, 96


def make_demo(folder, kind="motions", train=400, val=200, seed=0):
    """Writes folder/{train,val}/class/*.mp4 (H.264, 48 frames of 96 x 96) and the lists train.txt and val.txt.

    A glowing shape moves over a darker, slowly drifting background; the ten classes are motions. A look is a shape, the
    colours of the shape and those of the background. What varies per video in all classes: size, place, speed, drift
    and angle. `kind` says what a look tells of the class:
        scenes   each pair of adjacent classes has its own shape, in 24 looks: a frame tells the pair, as in Kinetics
        motions  all classes share 8 looks: a frame tells nothing of the class, as in Something-Something
        looks    each video has its own look, which identifies the video but not its class
    Video i of a split is a pure function of (kind, seed, split, i). The folder must be empty or not exist.
    """
    folder, partial = Path(folder), Path(f"{folder}.partial")
    if kind not in ("scenes", "motions", "looks"):
        raise cmaev.CMAEVError(f"no kind {kind!r} of demo videos: choose from scenes, motions, looks")
    if folder.exists() and os.listdir(folder):
        raise cmaev.CMAEVError(f"{folder} is not empty: remove it, or make the demo's videos in another folder")
    on_linux = sys.platform == "linux"  # there, forked: no worker imports torch
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count()
    context = multiprocessing.get_context("fork" if on_linux else None)
    with ProcessPoolExecutor(cores, context, cmaev.ignore_signals, (None,)) as pool:
        for split, (name, count) in enumerate((("train", train), ("val", val))):
            make = functools.partial(make_video, partial, name, kind, (seed, split))
            lines = pool.map(make, range(count))
            (partial / f"{name}.txt").write_text("".join(lines))
    os.replace(partial, folder)


def make_video(folder, name, kind, seeds, i):
    """Writes video i of the split `name` in a folder -> its line of the list."""
    label = i % len(DEMO_CLASSES)
    file = f"{name}/{DEMO_CLASSES[label]}/{i:05d}.mp4"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    write_video(folder / file, demo_video(label, np.random.default_rng((*seeds, i)), kind))
    return f"{file} {label}\n"


def write_video(path, frames, rate=24):
    """Writes uint8 RGB frames, each [H, W, 3], as H.264: the same file every time.

    One thread: PyAV has libx264 cut a slice per thread. With mbtree, a few files in 100 differ.
    """
    options = {"crf": "18", "preset": "veryfast", "x264-params": "sync-lookahead=0:mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                stream.thread_count = 1  # x264's, and the colour conversion's
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))


def demo_video(label, rng, kind):
    """The frames of one demo video, uint8 [H, W, 3] each."""
    motion, shape, look = DEMO_CLASSES[label], label // 2, rng
    if kind == "scenes":
        look = np.random.default_rng((5, shape, rng.integers(24)))
    else:
        look = np.random.default_rng((7, rng.integers(8))) if kind == "motions" else rng
        shape = look.integers(len(DEMO_SHAPES))
    background, surface = demo_texture(look, (110, 240), (0.08, 0.35)), demo_texture(look, (1.2, 2.4), (0.6, 0.9))
    glow = 0.6 * surface(np.zeros((2, 1), np.float32))
    size, middle = rng.uniform(19, 27), DEMO_SIDE / 2 + rng.uniform(-12, 12, 2)
    angle, place, drift = rng.uniform(0, 2 * np.pi), rng.uniform(-20, 20, 2), rng.normal(0, 0.12, 2)
    speed, growth, reach, radius = (rng.uniform(*span) for span in ((0.7, 1.4), (0.02, 0.035), (12, 19), (11, 18)))
    beat, turn, phase = 2 * np.pi / rng.uniform(30, 44), 2 * np.pi / rng.uniform(40, 60), rng.uniform(0, 2 * np.pi)
    direction = np.array(dict(left=(0, -1), right=(0, 1), up=(-1, 0), down=(1, 0)).get(motion, (0, 0)))
    swing = np.array(dict(swinging=(0, 1), bobbing=(1, 0)).get(motion, (0, 0)))
    spin = dict(clockwise=1, counterclockwise=-1).get(motion, 0)
    scale = dict(growing=1, shrinking=-1).get(motion, 0)
    circle = lambda t: radius * np.array([np.sin(phase + spin * turn * t), np.cos(phase + spin * turn * t)])
    path = lambda t: direction * speed * t + swing * reach * np.sin(phase + beat * t) + circle(t)
    turned = np.float32([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    pixels = np.float32(np.mgrid[:DEMO_SIDE, :DEMO_SIDE]).reshape(2, -1)  # rows, columns
    for t in np.arange(DEMO_FRAMES) - DEMO_FRAMES // 2:
        side = size * np.exp(scale * growth * t)
        local = turned.T @ (pixels - np.float32(middle + path(t) - path(0))[:, None]) / np.float32(side)
        inside = side * signed_distance(DEMO_SHAPES[shape], local)  # pixels to the edge
        edge = np.clip(inside / 4 + 0.5, 0, 1)
        halo = 0.9 * np.exp(-(np.clip(-inside, 0, None) / 26) ** 2)
        around = (1 - halo) * background(pixels - np.float32(place + drift * t)[:, None]) + halo * glow
        image = edge * surface(local) + (1 - edge) * around
        colors = np.clip(image * 255, 0, 255).astype(np.uint8)
        yield np.stack(colors, axis=-1).reshape(DEMO_SIDE, DEMO_SIDE, 3)


def signed_distance(shape, points):
    """The approximate distance to the edge of a shape of radius 1, positive inside: [2, N] -> [N]."""
    x, y = np.abs(points)
    return {"disk": lambda: 1 - np.hypot(x, y), "square": lambda: 0.85 - np.maximum(x, y),
            "ring": lambda: 0.33 - np.abs(np.hypot(x, y) - 0.7),
            "cross": lambda: np.maximum(np.minimum(0.33 - x, 1 - y), np.minimum(0.33 - y, 1 - x)),
            "triangle": lambda: 0.55 - np.maximum(points[0], 0.866 * y - 0.5 * points[0])}[shape]()


def demo_texture(rng, lengths, bases):
    """Two random coloured waves: a function of coordinates [2, N] -> RGB [3, N], mostly in 0 to 1."""
    angle, length = rng.uniform(0, 2 * np.pi, 2), rng.uniform(*lengths, 2)
    waves = np.float32(np.stack([np.cos(angle), np.sin(angle)]) * 2 * np.pi / length)
    phase, base, color = rng.uniform(0, 2 * np.pi, 2), rng.uniform(*bases, 3), rng.normal(size=(2, 3))
    color *= 0.2 / np.linalg.norm(color, axis=1, keepdims=True)
    phase, base, color = np.float32(phase)[:, None], np.float32(base)[:, None], np.float32(color)
    return lambda points: base + color.T @ np.sin(waves.T @ points + phase)


def main():
    parser = cmaev.argument_parser(__doc__)
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--kind", default="motions", help="motions, scenes or looks")
    parser.add_argument("--train", type=cmaev.WHOLE, default=400, help="videos to train on")
    parser.add_argument("--val", type=cmaev.WHOLE, default=200, help="videos to test on")
    parser.add_argument("--seed", type=cmaev.WHOLE, default=0)
    make_demo(**vars(parser.parse_args()))


if __name__ == "__main__":
    cmaev.run_script(main)
