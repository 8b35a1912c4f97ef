"""Short runs of the demo, each broken as users break theirs, beside healthy ones: what does the log show?

    python -m experiments.sick results.jsonl             all runs, in turn; run again, it goes on
    python -m experiments.sick results.jsonl figure      draws experiments/figures/sick.png (pip install matplotlib)
    python -m experiments.sick results.jsonl momentum-0  one run, which is not added to the results

10 epochs (250 steps) of pre-training, then a k-NN probe; two runs fine-tune the healthy run for 5 epochs. The results
are each run's log lines, and the last line that it printed. runs/sick/NAME.log keeps all that it printed.
"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import cmaev
import finetune
import pretrain

import torch
import torch.nn.functional as F

HEALTHY = {"healthy": "", "healthy-1": "--seed 1", "healthy-2": "--seed 2"}
TUNING = "--epochs 5 --val-every 1 --init runs/sick/healthy"
RUNS = HEALTHY | {  # name: flags of pretrain.py, or of finetune.py for the last two; BREAKS patches the code of some
    "rate-x10": "--lr 5e-2", "positives-only": "", "color-gain": "", "same-view": "--max-shift 0 --no-color-augment",
    "accumulated": "", "mask-98": "--mask-ratio 0.98", "momentum-0": "--momentum 0",
    "right-labels": TUNING, "wrong-labels": TUNING}
info_nce, contrastive_loss = cmaev.info_nce, cmaev.CMAEV.contrastive_loss
frames_of, read_labelled = cmaev.Video.frames, finetune.read_labelled


def positives_only(query, key, temperature, video_index):
    """InfoNCE without its denominator: nothing pushes the videos apart."""
    _, accuracy = info_nce(query, key, temperature, video_index)
    return -F.cosine_similarity(query.float(), key.float()).mean() / temperature, accuracy


def color_gain(video, indices):
    """A constant gain per video and colour channel tells each video from all others."""
    gain = 0.6 + 0.8 * torch.rand(3, generator=torch.Generator().manual_seed(zlib.crc32(video.path.encode())))
    return {i: (image * gain).clamp(max=255).byte() for i, image in frames_of(video, indices).items()}


def accumulated(model, *rows):
    """Plain gradient accumulation, 4 clips at a time: batch statistics and negatives of these 4 alone."""
    parts = [contrastive_loss(model, *part) for part in zip(*(x.split(4) for x in rows))]
    return [torch.stack(values).mean() for values in zip(*parts)]


def wrong_labels(path):
    """A list's labels in another order: of training and test videos."""
    videos, labels = zip(*read_labelled(path))
    return list(zip(videos, cmaev.subset(list(labels), len(labels), seed=0)))


BREAKS = {"positives-only": (cmaev, "info_nce", positives_only), "color-gain": (cmaev.Video, "frames", color_gain),
          "accumulated": (cmaev.CMAEV, "contrastive_loss", accumulated),
          "wrong-labels": (finetune, "read_labelled", wrong_labels)}


def run(name):
    if name in BREAKS:
        setattr(*BREAKS[name])
    usual = f"--workers 0 --epochs 10 --log-every 25 --out runs/sick/{name} {RUNS[name]}".split()
    if RUNS[name] is not TUNING:
        sys.argv[1:] = [*usual, "--picture-every", "0"]
        pretrain.main()
        usual = f"--workers 0 --probe knn --init runs/sick/{name}".split()
    sys.argv[1:] = usual
    finetune.main()


def run_all(results, done):
    for name in [name for name in RUNS if name not in done]:
        printed = Path(f"runs/sick/{name}.log")
        printed.parent.mkdir(parents=True, exist_ok=True)
        with open(printed, "a") as file:
            subprocess.run([sys.executable, "-m", "experiments.sick", results, name], stdout=file,
                           stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        with open(results, "a") as file:
            for line in cmaev.read_log(f"runs/sick/{name}"):
                print(json.dumps(dict(run=name) | line), file=file)
            print(json.dumps(dict(run=name, printed=printed.read_text().splitlines()[-1])), file=file)


def draw(lines):
    """A column per break, in red; the healthy runs, or the fine-tuning with the right labels, in grey."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    sick = list(RUNS)[len(HEALTHY):-2]
    figure, axes = pyplot.subplots(4, len(sick) + 1, figsize=(16, 7), sharex=True)
    panels = dict(reconstruction="L_r", contrast="InfoNCE", accuracy="accuracy", effective_rank="rank")
    columns = [([*HEALTHY, name], panels) for name in sick]
    columns.append((["right-labels", "wrong-labels"], dict(loss="training loss", val_top1="test top-1, %")))
    for column, (names, titles) in enumerate(columns):
        axes[0, column].set_title(names[-1])
        for ax, (key, title) in zip(axes[:, column], titles.items()):
            for name in names:
                points = [(line["step"], line[key]) for line in lines if line["run"] == name and key in line]
                ax.plot(*zip(*points), color="C3" if name == names[-1] else "0.6")
            if column in (0, len(sick)):
                ax.set_ylabel(title)
            elif key != "contrast":
                ax.sharey(axes[list(panels).index(key), 0])
            ax.grid(alpha=0.3)
    axes[2, -1].axis("off")
    axes[3, -1].axis("off")
    axes[3, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig("experiments/figures/sick.png", dpi=80)


results, what = (*sys.argv[1:], "all")[:2]
lines = [json.loads(line) for line in open(results)] if os.path.exists(results) else []
if what in RUNS:
    cmaev.run_script(lambda: run(what))
elif what == "figure":
    draw(lines)
else:
    run_all(results, {line["run"] for line in lines})
