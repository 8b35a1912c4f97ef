"""Writes a run's log and pictures for TensorBoard into its folder, and follows it (pip install tensorboard).

    python -m tools.tensorboard runs/pretrain-demo [--once]      beside: tensorboard --logdir runs
"""

import time
from pathlib import Path

import cmaev


def main():
    parser = cmaev.argument_parser(__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--once", action="store_true", help="end after what is there")
    s = parser.parse_args()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise cmaev.CMAEVError("tools.tensorboard needs the package tensorboard: pip install it") from None
    if not (s.run / "log.jsonl").is_file():
        raise cmaev.CMAEVError(f"{s.run} holds no log of a run: give an --out folder of pretrain.py or "
                               "finetune.py")

    writer, last = SummaryWriter(s.run), 0
    while True:
        records = cmaev.read_log(s.run)
        end = max((record["step"] for record in records), default=0)
        if end < last:  # the run goes on from an earlier checkpoint
            writer, last = SummaryWriter(s.run, purge_step=end + 1), end
        for record in records:
            for name, value in record.items() if record["step"] > last else ():
                writer.add_scalar(name, value, record["step"])
        for picture in s.run.glob("reconstruction-*.png"):
            step = int(picture.stem.removeprefix("reconstruction-"))
            if last < step <= end:
                writer.add_image("reconstruction", cmaev.read_image(picture), step, dataformats="HWC")
        writer.flush()
        last = end
        if s.once:
            break
        time.sleep(10)


if __name__ == "__main__":
    cmaev.run_script(main)
