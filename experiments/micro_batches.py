"""Peak memory and time of a step in micro-batches, against the whole batch at once, on a CPU with synthetic clips.

    python -m experiments.micro_batches [flags of pretrain.py]

Runs batch B in micro-batches of M (default 64 and 8, vit_small, 16 x 112 x 112), batch B at once and batch M, in turn,
each in a process of its own, with one warm-up step. Prints a line of JSON per process, and the medians of the rounds.
"""

import json
import multiprocessing
import sys
import time
from itertools import repeat

import cmaev
import pretrain
from experiments.benchmark import peak_memory, synthetic_batch

import numpy as np
import torch

USUAL = "--recipe k400 --encoder vit_small --size 112 --batch-size 64 --micro-batch 8".split()
ROUNDS, STEPS = 3, 2


def step(arguments, results):
    """Sends a process's seconds per step and its peak memory before and after the steps, in MiB."""
    sys.argv[1:] = arguments
    s, device = pretrain.read_settings(), cmaev.join_ranks()
    model, _, _, train_step = pretrain.build(s, device)
    feed = cmaev.Feed(repeat(synthetic_batch(s, model, s.micro_batch or s.batch_size, device)), device)
    before = peak_memory(device)
    for timed in (False, True):
        began = time.perf_counter()
        for _ in range(STEPS if timed else 1):
            train_step(feed)
    results.put(dict(seconds=(time.perf_counter() - began) / STEPS, before=before, peak=peak_memory(device)))


def main():
    arguments = USUAL + sys.argv[1:]
    sys.argv[1:] = arguments
    s = pretrain.read_settings()
    processes = multiprocessing.get_context("spawn")
    results, rounds = processes.SimpleQueue(), {"in parts": [], "at once": [], "small": []}
    for _ in range(ROUNDS):
        for name, more in {"in parts": [], "at once": ["--micro-batch", "0"],
                           "small": ["--batch-size", str(s.micro_batch), "--micro-batch", "0"]}.items():
            process = processes.Process(target=step, args=(arguments + more, results))
            process.start()
            process.join()
            rounds[name].append(results.get())
            print(json.dumps(dict(name=name, torch=torch.__version__, threads=torch.get_num_threads(), amp=s.amp,
                                  **rounds[name][-1])), flush=True)
    ratio = lambda of, to, value: np.median([value(a) / value(b) for a, b in zip(rounds[of], rounds[to])])
    print(f"batch {s.batch_size} in micro-batches of {s.micro_batch}: "
          f"{ratio('in parts', 'at once', lambda r: r['seconds']):.3f} x the time of the batch at once; peak memory "
          f"{ratio('in parts', 'small', lambda r: r['peak']):.3f} x that of batch {s.micro_batch}, "
          f"{ratio('in parts', 'small', lambda r: r['peak'] - r['before']):.3f} x without the memory before the steps")


if __name__ == "__main__":
    main()
