"""Times pretrain.py's training step on synthetic clips and, where --data is given, on its videos and their reading.

    python -m experiments.benchmark --recipe k400 --compile --batch-size 64 [--data list.txt]

All flags are those of pretrain.py. Prints a table, and last a line of JSON with the settings and all figures.
"""

import json
import resource
import time
from copy import deepcopy
from itertools import repeat

import cmaev
import pretrain

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

STEPS = 20


def clip_flops(model, mask_ratio):
    """Floating-point operations of one pre-training step per clip, counted by torch (multiply-add = 2).

    The online side counts three times, backward being two forwards; the heads, under 0.1 %, are left out.
    """
    encoder, decoder = deepcopy(model.encoder).to("meta"), deepcopy(model.decoder).to("meta")
    clip = torch.empty(1, 3, *(n * side for n, side in zip(encoder.grid, encoder.cube)), device="meta")
    visible, masked = cmaev.visible_and_masked(cmaev.tube_mask(1, encoder.grid, mask_ratio), clip.device)
    with FlopCounterMode(display=False) as online, torch.no_grad():
        decoder(encoder(clip, visible), visible, masked)
    with FlopCounterMode(display=False) as target, torch.no_grad():
        encoder(clip)
    return 3 * online.get_total_flops() + (target.get_total_flops() if model.contrast_weight else 0)


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    """Peak MiB of a GPU's allocated memory; on a CPU of the process's resident memory, in Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def matrix_rate(device, dtype, repeats=10):
    """TFLOP/s of a large square matrix product in `dtype` or float32 (None): the median of several."""
    side, seconds = 8192 if device.type == "cuda" else 2048, []
    a = torch.randn(side, side, device=device).to(dtype or torch.float32)
    for _ in range(repeats + 2):
        began = time.perf_counter()
        a @ a
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / np.median(seconds[2:]) / 1e12


def synthetic_batch(s, model, count, device):
    """One micro-batch as the loader gives it: random pixels, `count` videos of one clip."""
    pixels = lambda: torch.randint(256, (count, 1, s.frames, 3, s.size, s.size), dtype=torch.uint8)
    batch = dict(online=pixels(), mask=cmaev.tube_mask(count, model.encoder.grid, s.mask_ratio)[:, None],
                 replaced=torch.zeros(count, 1, dtype=torch.bool))
    if s.contrast_weight:
        batch.update(target=pixels(), colors=torch.stack([cmaev.draw_colors() for _ in range(count)])[:, None],
                     video_index=torch.arange(count)[:, None])
    return {name: x.pin_memory() for name, x in batch.items()} if device.type == "cuda" else batch


def main():
    s = pretrain.read_settings()
    device = cmaev.join_ranks()
    world = cmaev.world_size()
    videos = pretrain.read_videos(s) if s.data else []
    model, optimizer, _, train_step = pretrain.build(s, device)
    parts = cmaev.count_micro_batches(s, s.repeats)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    flops, dtype = clip_flops(model, s.mask_ratio), cmaev.amp_dtype(s.amp, device)
    peak, workers = matrix_rate(device, dtype), cmaev.loader([], s.workers, device).num_workers
    warm = 5 + 2 * workers  # compilation, memory, and the batches that are read ahead meanwhile
    batch = synthetic_batch(s, model, s.batch_size // (world * parts), device)
    feeds = dict(synthetic=cmaev.Feed(repeat(batch), device))
    if videos:
        clips = cmaev.PretrainClips(videos, model.encoder.grid, s.frames, s.rate, s.max_shift, s.size, s.mask_ratio,
                                    s.repeats, s.seed, two_views=s.contrast_weight > 0)
        load = cmaev.loader(clips, s.workers, device, batch_sampler=cmaev.batches(
            len(videos), s.batch_size // s.repeats, 2 * (warm + STEPS), s.seed, num_micro_batches=parts))
        feeds["data"] = feeds["reading"] = cmaev.Feed(load, device)

    rows = {}
    for name, feed in feeds.items():
        for steps in (warm, STEPS):
            wait_for(device)
            feed.waited()
            began = time.perf_counter()
            for _ in range(steps):
                if name == "reading":
                    for _ in range(parts):
                        next(feed)
                else:
                    train_step(feed)
            wait_for(device)
            seconds = time.perf_counter() - began
        rate = STEPS * s.batch_size / seconds
        rows[name] = dict(clips_per_s=rate, step_ms=1000 * seconds / STEPS)
        if name != "reading":
            rows[name].update(tflop_per_s=flops * rate / world / 1e12, data_wait=feed.waited() / seconds,
                              memory_mib=peak_memory(device))

    cmaev.print0(f"{s.encoder}, {s.frames} x {s.size} x {s.size}, batch {s.batch_size}, {dtype or torch.float32}, "
                 f"{'compiled' if s.compile else 'not compiled'}, {world} x {device.type}; {flops / 1e9:.1f} G "
                 f"operations per clip; a rank's matrix products: {peak:.3g} TFLOP/s")
    for name, row in rows.items():
        text = "{:<10}{clips_per_s:9.1f} clips/s {step_ms:9.1f} ms per step".format(name, **row)
        if name != "reading":
            text += (f"{row['tflop_per_s']:9.3g} TFLOP/s per rank = {row['tflop_per_s'] / peak:.0%}"
                     f"{row['memory_mib']:9.0f} MiB   data wait {row['data_wait']:.0%}")
        cmaev.print0(text)
    if videos and workers:
        needed = rows["synthetic"]["clips_per_s"] / rows["reading"]["clips_per_s"] * workers
        cmaev.print0(f"to read as fast as it trains on synthetic clips, a rank needs {needed:.1f} decoding processes")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    cmaev.print0(json.dumps(dict(settings=vars(s), device=name, world_size=world, torch=torch.__version__,
                                 gflop_per_clip=flops / 1e9, matrix_tflop_per_s=peak, **rows)))


if __name__ == "__main__":
    cmaev.run_script(main)
