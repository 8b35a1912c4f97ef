"""Turns a clone of EgoGestAR, ten pointing gestures filmed from the head, into small files, lists and five folds.

    git clone https://github.com/varunj/EgoGestAR
    python -m experiments.footage EgoGestAR data/ego

Writes data/ego/gesture/*.mp4 (H.264, short side 96 pixels), all.txt (every clip, for pre-training), and train0.txt and
test0.txt to train4.txt and test4.txt, the labelled clips in five folds. experiments/footage.sh trains on them. The
clips carry no licence: cite the data set, do not redistribute it.
"""

import argparse
from pathlib import Path

import cmaev
from tools.demo_videos import write_video

import torch
from torchvision.transforms import v2

FOLDS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="the cloned repository")
    parser.add_argument("out", type=Path, help="folder for the files and lists")
    s = parser.parse_args()
    clips = sorted((s.clone / "testvideo").glob("testvideo_*_*.mp4"))
    if not clips:
        raise cmaev.CMAEVError(f"{s.clone} has no testvideo/testvideo_*.mp4: give a clone of varunj/EgoGestAR")
    gesture = {clip: clip.stem.split("_")[1] for clip in clips}
    names = sorted(set(gesture.values()) - {"unclassified"})
    lines, labelled = [], []
    for clip in clips:
        file = f"{gesture[clip]}/{clip.stem.removeprefix('testvideo_')}.mp4"
        (s.out / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            video = cmaev.Video(clip)
            frames = video.read(range(len(video))).movedim(-1, 1)  # [T, 3, H, W]
        except cmaev.BadVideo as error:
            print(f"left out: {error}")
            continue
        height, width = (2 * round(48 * side / min(frames.shape[2:])) for side in frames.shape[2:])
        small = v2.functional.resize(frames, [height, width], antialias=True).movedim(1, -1)
        write_video(s.out / file, small.numpy(), rate=25)
        lines.append(f"{file}\n")
        if gesture[clip] in names:
            labelled.append(f"{file} {names.index(gesture[clip])}\n")
    with cmaev.seeded(0) as generator:
        order = torch.randperm(len(labelled), generator=generator).tolist()
    (s.out / "all.txt").write_text("".join(lines))
    (s.out / "names.txt").write_text("".join(f"{name}\n" for name in names))
    for fold in range(FOLDS):
        test = set(order[fold::FOLDS])
        for split, chosen in (("test", test), ("train", set(order) - test)):
            (s.out / f"{split}{fold}.txt").write_text("".join(labelled[i] for i in sorted(chosen)))
    print(f"{s.out}: {len(lines)} clips, {len(labelled)} of them of the gestures {', '.join(names)}")


if __name__ == "__main__":
    cmaev.run_script(main)
