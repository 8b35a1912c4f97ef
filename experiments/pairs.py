"""Probes like finetune.py's on the videos of robot_videos.py: do the answers stay in the pair (labels 2k and 2k + 1)?

    python -m experiments.pairs --recipe demo --rate 5 --data data/robot/train.txt --val data/robot/val.txt --init RUN
    python -m experiments.pairs runs/tuned/eval-checkpoint-56-1x1/predictions.csv     fine-tuned-pair of a run

Prints "measure value" lines, in per cent except rank. linear, knn: top-1 with 30 labels. *-pair: the share of errors
with the right scene and the wrong direction. linear-all: a linear probe with all labels; scene: the share of its
answers in the right pair; direction: the share of these that are right. nearest-all: top-1 of the nearest training
video. rank: the features' effective rank.
"""

import csv
import sys

import cmaev
import finetune
import pretrain

import torch

LABELS = 30


def percent(found):
    """Bools -> their share, NaN of none."""
    return 100 * float(found.float().mean())


def inside(found, labels):
    """The share of errors inside the pair, of classes [M]."""
    return percent((found // 2 == labels // 2)[found != labels])


def main():
    if sys.argv[1].endswith(".csv"):
        rows = list(csv.DictReader(open(sys.argv[1])))
        names = list(dict.fromkeys(row["label"] for row in rows))  # the lists begin with labels 0, 1, 2, ...
        found, labels = (torch.tensor([names.index(row[column]) for row in rows]) for column in ("class1", "label"))
        return print(f"fine-tuned-pair {inside(found, labels):.2f}")
    s, device = finetune.read_settings(), cmaev.join_ranks()
    videos, tests, names, _ = finetune.read_classes(s)
    encoder = finetune.frozen_encoder(s)
    train, test = (finetune.pooled_features(s, encoder, listed, device) for listed in (videos, tests))
    labels, truth = (torch.tensor([label for _, label in listed]) for listed in (videos, tests))
    few = cmaev.subset(list(range(len(videos))), LABELS, s.seed)  # those of --subset
    for name, classify in (("linear", finetune.linear_probe), ("knn", finetune.nearest_neighbours)):
        found = classify(train[few], labels[few], test, len(names)).argmax(dim=1)
        print(f"{name} {percent(found == truth):.2f}\n{name}-pair {inside(found, truth):.2f}")
    found = finetune.linear_probe(train, labels, test, len(names)).argmax(dim=1)
    scene = found // 2 == truth // 2
    nearest = finetune.nearest_neighbours(train, labels, test, len(names), k=1).argmax(dim=1)
    print(f"linear-all {percent(found == truth):.2f}\nscene {percent(scene):.2f}")
    print(f"direction {percent((found == truth)[scene]):.2f}\nnearest-all {percent(nearest == truth):.2f}")
    print(f"rank {pretrain.effective_rank(train):.2f}")


if __name__ == "__main__":
    cmaev.run_script(main)
