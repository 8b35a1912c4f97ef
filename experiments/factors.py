"""What frozen features tell of the videos of make_demo's "scenes" or "motions": class, pair of classes, look.

    python -m experiments.factors scenes none runs/scenes-mae-0 runs/scenes-cmaev-0

For each run, or the untrained encoder, on the data of experiments/ablation.sh: top-1 of a linear probe of each with
1,000 labels; the share of test videos whose nearest training video (cosine) has the same class, pair or look; and the
effective rank of the features, the exponential of the entropy of their covariance's normalised eigenvalues.
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
factors = {"class": {}, "pair": {}, "look": {}}
for number, (split, listed) in enumerate(videos.items()):
    labels = torch.tensor([label for _, label in listed])
    drawn = [np.random.default_rng((1, number, i)).integers(24 if kind == "scenes" else 8) for i in range(len(listed))]
    looks = torch.tensor(drawn) + 24 * (labels // 2) * (kind == "scenes")
    for name, values in (("class", labels), ("pair", labels // 2), ("look", looks)):
        factors[name][split] = values
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
    print(flush=True)
