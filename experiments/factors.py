"""What frozen features tell of make_demo's videos: class, pair of classes, look (of kind "looks": the shape), and more.

    python -m experiments.factors scenes none runs/scenes-mae-0 runs/scenes-cmaev-0

For each run, or the untrained encoder, on the data of experiments/ablation.sh: top-1 of a linear probe of each with
1,000 labels; the share of test videos whose nearest training video (cosine) has the same class, pair or look; the
effective rank of the features, the exponential of the entropy of their covariance's normalised eigenvalues; and how far
nearest videos agree in the colour of the corners and in the way that the bright spot moves: 1 minus their mean squared
difference over that of two random videos.
"""

import functools
import sys
from argparse import Namespace

import cmaev
import finetune

import numpy as np
import torch
import torch.nn.functional as F

kind, *runs = sys.argv[1:]
s = Namespace(rate=4, sampling="dense", segments=1, crops=1)
cpu = torch.device("cpu")
score = functools.partial(finetune.score_videos, batch=50, workers=0, device=cpu)
videos = {split: cmaev.read_list(f"data/{kind}/{split}.txt") for split in ("train", "val")}


def color_and_way(path):
    """Mean RGB of the corners, 8 x 8 each, of the middle 56 x 56 pixels, and the way of the centre of brightness."""
    frames = cmaev.Video(path).read(range(10, 39, 4))[:, 20:76, 20:76].float() / 255
    corners = torch.stack([frames[:, rows, columns] for rows in (slice(8), slice(48, 56))
                           for columns in (slice(8), slice(48, 56))])
    light = frames.mean(dim=3)
    light = light - light.amin(dim=(1, 2), keepdim=True)
    light = light / light.sum(dim=(1, 2), keepdim=True)
    places = torch.stack([light.sum(dim=axis) @ torch.arange(56.) for axis in (2, 1)])  # [2, T]: row, column
    return corners.mean(dim=(0, 1, 2, 3)), places[:, -1] - places[:, 0]


factors, measured = {"class": {}, "pair": {}, "look": {}}, {}
for number, (split, listed) in enumerate(videos.items()):
    labels = torch.tensor([label for _, label in listed])
    count = {"scenes": 24, "motions": 8, "looks": 5}[kind]  # demo_video's first draw
    drawn = [np.random.default_rng((1, number, i)).integers(count) for i in range(len(listed))]
    looks = torch.tensor(drawn) + 24 * (labels // 2) * (kind == "scenes")
    for name, values in (("class", labels), ("pair", labels // 2), ("look", looks)):
        factors[name][split] = values
    measured[split] = [torch.stack(values) for values in zip(*(color_and_way(path) for path, _ in listed))]
for run in runs:
    torch.manual_seed(0)
    encoder = cmaev.load_encoder(run) if run != "none" else cmaev.build_encoder("vit_tiny", frames=8, size=56, patch=8)
    train, val = (finetune.pooled_features(s, encoder, listed, score, cpu) for listed in videos.values())
    nearest = (F.normalize(val) @ F.normalize(train).T).argmax(dim=1)
    share = torch.linalg.svdvals(train - train.mean(dim=0)) ** 2
    share /= share.sum()
    print(f"{kind}, {run}: effective rank {(-(share * share.log()).sum()).exp():.1f}", end="")
    for name, values in factors.items():
        scores = finetune.linear_probe(train, values["train"], val, int(values["train"].max()) + 1)
        linear, neighbour = ((found == values["val"]).float().mean() for found in (
            scores.argmax(dim=1), values["train"][nearest]))
        print(f"; {name}: linear {linear:.1%}, nearest {neighbour:.1%}", end="")
    for name, of_train, of_val in zip(("colour", "way"), measured["train"], measured["val"]):
        agreement = 1 - (of_train[nearest] - of_val).square().mean() / (2 * of_val.var(dim=0).mean())
        print(f"; nearest agree in {name} {agreement:.2f}", end="")
    print(flush=True)
