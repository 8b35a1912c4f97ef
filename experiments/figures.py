"""Draws the figures of RESULTS.md: the demo, experiments/ablation.sh, data/robot (pip install matplotlib).

    python -m experiments.figures

It writes experiments/figures/* and the losses of the curves, experiments/results/*-curves.jsonl.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import cmaev
import torch
from torchvision.io import write_jpeg
from torchvision.utils import save_image

try:
    import matplotlib
except ImportError as error:
    sys.exit(f"{error}: pip install matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot

FIGURES, RESULTS = Path("experiments/figures"), Path("experiments/results")


def curves(name, rows, batch=16):
    """Draw the mean and the range over seeds of each row's losses; rows: {row: [a run per seed]}."""
    logs = {row: [cmaev.read_log(run) for run in runs] for row, runs in rows.items()}
    with open(RESULTS / f"{name}.jsonl", "w") as file:
        for row, runs in logs.items():
            for seed, log in enumerate(runs):
                for line in log:
                    losses = {key: round(line[key], 5) for key in (
                        "step", "reconstruction", "contrast", "accuracy", "grad_norm")}
                    print(json.dumps(dict(row=row, seed=seed, **losses)), file=file)
    panels = {"reconstruction": "reconstruction loss",
              "contrast": f"InfoNCE, chance ln {batch} = {math.log(batch):.2f}",
              "accuracy": f"accuracy of InfoNCE, chance 1/{batch}"}
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    for color, (row, runs) in enumerate(logs.items()):
        for ax, (key, title) in zip(axes, panels.items()):
            values = [[line[key] for line in lines] for lines in zip(*runs)]
            if any(map(any, values)):  # VideoMAE has no InfoNCE
                steps = [line["step"] for line in runs[0]]
                ax.plot(steps, [statistics.mean(v) for v in values], color=f"C{color}", label=row)
                ax.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=f"C{color}", alpha=0.2)
            ax.set(title=title, xlabel="step")
            ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=90)


def training(name, run, videos=3):
    """Draw one video: original, masked, mean colours, and reconstructed in the run's first and last picture."""
    files = sorted(Path(run).glob("reconstruction-*.png"))
    pictures = [cmaev.read_image(path).permute(2, 0, 1) for path in (files[0], files[-1])]
    side = (pictures[0].shape[1] - 2) // (4 * videos)
    rows = [pictures[0][:, :3 * side], *(picture[:, 3 * side:4 * side] for picture in pictures)]
    save_image(torch.cat(rows, dim=1) / 255, FIGURES / f"{name}.png")


def similarities(name, run, videos, count=16):
    """Draw the cosines of queries (rows) and keys (columns) before and after training; black -1, white 1."""
    torch.manual_seed(0)
    model = cmaev.CMAEV("vit_tiny", frames=8, size=56, patch=8)
    clips = cmaev.PretrainClips(cmaev.read_list(videos)[:count], model.encoder.grid, 8, 4, 8, 56, 0.8)
    batch = torch.utils.data.default_collate([clips[0, i] for i in range(count)])
    online, target = (cmaev.normalize(batch[view][:, 0]) for view in ("online", "target"))
    visible, _ = cmaev.visible_and_masked(batch["mask"][:, 0])
    pictures = []
    for state in (model.state_dict(), torch.load(f"{run}/checkpoint.pt", weights_only=True)["model"]):
        model.load_state_dict(state)
        with torch.no_grad():
            query = model.predictor(model.projector(model.encoder(online, visible).mean(dim=1)))
            key = model.target_projector(model.target_encoder(target).mean(dim=1))
        cosine = torch.nn.functional.cosine_similarity(query[:, None], key[None], dim=2)
        own, found = cosine.diag().mean(), (cosine.argmax(dim=1) == torch.arange(count)).float().mean()
        others = (cosine.sum() - count * own) / (count * (count - 1))
        print(f"cosine of own key {own:.2f}, of others {others:.2f}; own key found by {found:.0%}")
        pictures.append(((cosine + 1) * 127.5).byte().repeat_interleave(12, 0).repeat_interleave(12, 1))
    gap = torch.full((12 * count, 12), 255, dtype=torch.uint8)
    save_image(torch.cat([pictures[0], gap, pictures[1]], dim=1) / 255, FIGURES / f"{name}.png")


def pairs(name, videos, frames=5):
    """Draw frames of the first video of each class; the two classes of a pair side by side. JPEG."""
    first = {label: cmaev.Video(path) for path, label in reversed(cmaev.read_list(videos))}
    rows = [torch.cat(list(video.read(torch.linspace(0, len(video) - 1, frames).round())), dim=1)
            for _, video in sorted(first.items())]
    picture = torch.cat([torch.cat(rows[i:i + 2], dim=1) for i in range(0, len(rows), 2)])
    write_jpeg(picture.movedim(-1, 0).contiguous(), str(FIGURES / f"{name}.jpg"), quality=85)


for kind in ("scenes", "motions"):
    curves(f"{kind}-curves", {name: [str(run) for run in sorted(Path("runs").glob(f"{kind}-{row}-?"))] for name, row in
                              (("VideoMAE", "mae"), ("CMAE-V", "cmaev"), ("CMAE-V without shift", "noshift"))})
    similarities(f"{kind}-similarity", f"runs/{kind}-cmaev-0", f"data/{kind}/val.txt")
training("training", "runs/pretrain-demo")
pairs("robot", "data/robot/val.txt")
