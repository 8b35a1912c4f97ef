"""What frozen features tell of make_demo's videos: the class, the colour of the background, the motion.

    python -m experiments.factors scenes none runs/scenes-mae-0 runs/scenes-cmaev-0

For each run, or the untrained encoder, on the data of experiments/ablation.sh: the effective rank of the features;
top-1 of a linear probe with 1,000 labels; of test videos, the share whose nearest training video (cosine) has the same class;
and how far the two agree in background colour and in the displacement of the bright spot: 1 minus the mean squared
difference over that of random pairs.
"""

import sys
from argparse import Namespace

import cmaev
import finetune
import pretrain
from tools.demo_videos import DEMO_CLASSES

import torch
import torch.nn.functional as F

kind, *runs = sys.argv[1:]
s = Namespace(frames=8, rate=4, size=56, sampling="dense", segments=1, crops=1, amp="none", micro_batch=50, workers=0)
cpu = torch.device("cpu")
videos = [cmaev.read_list(f"data/{kind}/{split}.txt") for split in ("train", "val")]


def color_and_displacement(path):
    """For the middle 56 x 56 pixels: mean RGB of the corners, 8 x 8 each; displacement of the centre of brightness."""
    frames = cmaev.Video(path).read(range(10, 39, 4))[:, 20:76, 20:76].float() / 255
    corners = torch.stack([frames[:, rows, columns] for rows in (slice(8), slice(48, 56))
                           for columns in (slice(8), slice(48, 56))])
    light = frames.mean(dim=3)
    light = light - light.amin(dim=(1, 2), keepdim=True)
    light = light / light.sum(dim=(1, 2), keepdim=True)
    places = torch.stack([light.sum(dim=axis) @ torch.arange(56.) for axis in (2, 1)])  # [2, T]: row, column
    return corners.mean(dim=(0, 1, 2, 3)), places[:, -1] - places[:, 0]


labels = [torch.tensor([label for _, label in listed]) for listed in videos]
colors, displacements = zip(*(map(torch.stack, zip(*(color_and_displacement(path) for path, _ in listed)))
                              for listed in videos))
for run in runs:
    torch.manual_seed(0)
    encoder = cmaev.load_encoder(run) if run != "none" else cmaev.build_encoder("vit_tiny", frames=8, size=56, patch=8)
    train, val = (finetune.pooled_features(s, encoder, listed, cpu) for listed in videos)
    nearest = (F.normalize(val) @ F.normalize(train).T).argmax(dim=1)
    rank = pretrain.effective_rank(train)
    scores = finetune.linear_probe(train, labels[0], val, len(DEMO_CLASSES))
    linear, neighbour = ((found == labels[1]).float().mean() for found in (scores.argmax(dim=1), labels[0][nearest]))
    color, displacement = (1 - (of_train[nearest] - of_val).square().mean() / (2 * of_val.var(dim=0).mean())
                           for of_train, of_val in (colors, displacements))
    print(f"{kind}, {run}: effective rank {rank:.1f}; class: linear {linear:.1%}, nearest {neighbour:.1%}; nearest "
          f"agree in colour {color:.2f}, in displacement {displacement:.2f}", flush=True)
