"""Draws the logs of runs of pretrain.py or finetune.py, one curve per run (pip install matplotlib).

    python -m tools.curves runs/pretrain-demo runs/idea [--out curves.png]
"""

import os
from pathlib import Path

import cmaev

PANELS = dict(loss="loss", reconstruction="reconstruction loss", contrast="InfoNCE",
              accuracy="accuracy of InfoNCE", effective_rank="effective rank of the features",
              held_out_reconstruction="held-out reconstruction loss",
              val_top1="top-1 of one view, per cent")


def main():
    parser = cmaev.argument_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", default="curves.png", help="the picture")
    s = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise cmaev.CMAEVError("tools.curves needs the package matplotlib: pip install it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {}
    for run in s.runs:
        logs[run] = cmaev.read_log(run) if (run / "log.jsonl").is_file() else []
        if not logs[run]:
            raise cmaev.CMAEVError(f"{run} holds no log of a run: give an --out folder of pretrain.py or "
                                   "finetune.py")
    common = os.path.commonpath([run.absolute().parent for run in logs])
    panels = [name for name in PANELS if any(line.get(name) for log in logs.values() for line in log)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for ax, name in zip(axes[0], panels):
        for i, (run, log) in enumerate(logs.items()):
            points = [(line["epoch"], line[name]) for line in log if name in line]
            label = os.path.relpath(run.absolute(), common)
            ax.plot(*zip(*points), color=f"C{i}", marker="." if len(points) < 30 else "", label=label)
        ax.set(title=PANELS[name], xlabel="epoch")
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(s.out, dpi=90)
    print(s.out)


if __name__ == "__main__":
    cmaev.run_script(main)
