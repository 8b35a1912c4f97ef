"""Times changes of the compiled training step of ViT-B, each alone beside today's build, alternating.

    python -m experiments.gpu --recipe k400 --batch-size 64
    python -m experiments.gpu --recipe demo --encoder vit_tiny --size 32 --batch-size 4    a check on a CPU

All flags are those of pretrain.py; synthetic clips. Prints today's operations by time, and a row per change:
clips/s, today's in the same rounds, the median ratio, seconds to compile, the loss of the first step (all the
same but for rounding), the attention that it calls; last a line of JSON. "best": all changes that gain 1 %.
"""

import json
import time
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from unittest import mock

import cmaev
import numpy as np
import pretrain
import torch
from experiments.benchmark import synthetic_batch, wait_for
from torch._inductor import compile_fx, list_mode_options
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

ROUNDS, STEPS = 7, 3
CHANGES = {"bf16 stream": dict(stream=torch.bfloat16),  # the most interesting first
           "cudnn": dict(attention=SDPBackend.CUDNN_ATTENTION),
           "flash": dict(attention=SDPBackend.FLASH_ATTENTION),
           "max-autotune": dict(mode="max-autotune-no-cudagraphs"),
           "best": {},
           "efficient": dict(attention=SDPBackend.EFFICIENT_ATTENTION)}


def build(s, device, stream=None, attention=None, mode=None):
    """Builds pretrain.py's model and step, compiled, with these changes -> step() -> the loss."""
    options = list_mode_options(mode) if mode else {}
    # torch.compile's own backend as a new object: else it takes the graphs that an earlier change compiled
    backend = lambda graph, inputs: compile_fx.compile_fx(graph, inputs, config_patches=options)
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        model, optimizer, _, train_step = pretrain.build(s, device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if stream:  # the input of the first blocks; the type of all others follows
        for part in (model.encoder, model.target_encoder, model.decoder):
            part.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].to(stream),))
    feed = cmaev.Feed(repeat(synthetic_batch(s, model, s.batch_size, device)), device)

    def step():
        with sdpa_kernel(attention) if attention else nullcontext():
            return train_step(feed)[0]["loss"]
    return step


def main():
    s, device = pretrain.read_settings(), cmaev.join_ranks()
    s.compile = True
    torch._dynamo.config.recompile_limit = 64  # for all models together
    torch._functorch.config.enable_autograd_cache = False  # its keys lack the attention that is asked for

    def first_step(**changes):
        torch.manual_seed(s.seed)
        began, step = time.perf_counter(), build(s, device, **changes)
        loss = step().item()
        row = dict(compile_s=time.perf_counter() - began, loss=loss)
        kinds = {ProfilerActivity.CPU, getattr(ProfilerActivity, device.type.upper())}
        with profile(activities=kinds) as profiled:
            step()
            wait_for(device)
        operations = profiled.key_averages()
        row["attention"] = sorted(o.key for o in operations if "::_scaled_dot_product" in o.key)
        return step, row, operations

    def seconds(step):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait_for(device)
        return (time.perf_counter() - began) / STEPS

    today, row, operations = first_step()
    print(operations.table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=90))
    print(f"{s.encoder}, batch {s.batch_size}, {cmaev.amp_dtype(s.amp, device) or torch.float32}, torch "
          f"{torch.__version__}; today's:", row, flush=True)
    rows, best = dict(today=row), {}
    for name, changes in CHANGES.items():
        try:
            step, row, _ = first_step(**changes or best)
            seconds(step), seconds(today)
            pairs = np.array([(seconds(step), seconds(today)) for _ in range(ROUNDS)])
        except Exception as error:  # no such kernel, out of memory: the other changes go on
            reason = " ".join(str(error).split())[:200]
            print(f"{name:14}failed: {type(error).__name__}: {reason}", flush=True)
            continue
        ratio, (rate, beside) = np.median(pairs[:, 1] / pairs[:, 0]), s.batch_size / np.median(pairs, axis=0)
        rows[name] = dict(clips_per_s=rate, today_clips_per_s=beside, ratio=ratio, **row)
        print(f"{name:14}{rate:8.1f} clips/s, today's {beside:8.1f}, ratio {ratio:.3f}", row, flush=True)
        if ratio > 1.01 and name != "best":
            best |= changes
    cmaev.print0(json.dumps(dict(settings=vars(s), device=device.type, torch=torch.__version__, **rows)))


if __name__ == "__main__":
    cmaev.run_script(main)
