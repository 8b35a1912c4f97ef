"""Times read_list on a list of a million videos against a plain loop over its lines: python -m experiments.lists 1000

The argument: folders that the videos (empty files) lie in. Medians of five rounds, alternating, processor time.
"""

import os
import statistics
import sys
import tempfile
import time

import cmaev

VIDEOS = 10**6


def plain_loop(path):
    root, videos = os.path.dirname(path), []
    with open(path) as file:
        for line in file:
            name, label = line.rsplit(maxsplit=1)
            videos.append((os.path.join(root, name), int(label)))
    return videos


with tempfile.TemporaryDirectory() as root:
    folders = int(sys.argv[1])
    for i in range(folders):
        os.mkdir(f"{root}/{i}")
    names = [f"{i % folders}/{i}.mp4" for i in range(VIDEOS)]
    for name in names:
        open(f"{root}/{name}", "x").close()
    with open(f"{root}/list.txt", "w") as file:
        file.writelines(f"{name} {i % 400}\n" for i, name in enumerate(names))
    seconds = {plain_loop: [], cmaev.read_list: []}
    for _ in range(5):
        for read, times in seconds.items():
            began = time.process_time()
            videos = read(f"{root}/list.txt")
            times.append(time.process_time() - began)
            assert len(videos) == VIDEOS
    plain, ours = seconds.values()
    print(f"{folders} folders: read_list {statistics.median(ours):.2f} s, x a plain loop "
          f"{statistics.median(a / b for a, b in zip(ours, plain)):.2f}")
