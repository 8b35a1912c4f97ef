"""Linear probe and k-NN like `finetune.py --probe`, with the share of errors inside a pair (labels 2k and 2k + 1).

    python -m experiments.pairs --recipe demo --data data/robot/train.txt --val data/robot/val.txt --init runs/mine
    python -m experiments.pairs runs/tuned/eval-checkpoint-56-1x1/predictions.csv     the share of a fine-tuned run

Prints "measure value" lines, in per cent. An error inside a pair knows the scene, but not the direction.
"""

import csv
import sys

import cmaev
import finetune

import torch


def inside(found, labels):
    """The share of errors inside a pair, in per cent, of classes [M] -> float, NaN without errors."""
    wrong = found != labels
    return 100 * float((found // 2 == labels // 2)[wrong].float().mean())


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
    for name, classify in (("linear", finetune.linear_probe), ("knn", finetune.nearest_neighbours)):
        found = classify(train, labels, test, len(names)).argmax(dim=1)
        print(f"{name} {100 * float((found == truth).float().mean()):.2f}")
        print(f"{name}-pair {inside(found, truth):.2f}")


if __name__ == "__main__":
    cmaev.run_script(main)
