"""Casts positions and mask token to the residual stream's bf16. In float32 they make the stream float32.

    python -m experiments.stream [pretrain.py's flags]    time of a training step, types at each point
    python -m experiments.stream pretrain [its flags]     pretrain.py with the cast

Steps of synthetic clips, alternating in one process; times are processor time on a CPU.
"""

import sys
import time
from itertools import repeat

import cmaev
import pretrain
from experiments.benchmark import synthetic_batch

import numpy as np
import torch
from torch.nn.utils.parametrize import register_parametrization


class BF16(torch.nn.Module):
    def forward(self, x):
        return x.bfloat16()


def build_cast(s, device, build=pretrain.build):
    """pretrain.build with x + positions.type_as(x) and a mask token of that type."""
    model, *others = build(s, device)
    for module in model.modules():
        if isinstance(module, (cmaev.Encoder, cmaev.PixelDecoder)):
            module.positions = module.positions.bfloat16()
    register_parametrization(model.decoder, "mask_token", BF16(), unsafe=True)
    return model, *others


def compare():
    s, device = pretrain.read_settings(), cmaev.join_ranks()
    variants, seconds = [pretrain.build(s, device), build_cast(s, device)], [[], []]
    feed = cmaev.Feed(repeat(synthetic_batch(s, variants[0][0], s.batch_size, device)), device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for _ in range(43):  # three of them to warm up
        for (*_, train_step), times in zip(variants, seconds):
            began = clock()
            train_step(feed)[1].item()  # the gradient's norm: waits for the device
            times.append(clock() - began)
    before, after = np.array(seconds)[:, 3:]
    print(f"{s.encoder}, {s.frames} x {s.size}, {s.batch_size} clips: {1000 * np.median(before):.1f} ms, "
          f"with the cast x {np.median(after / before):.3f}")
    for (model, *_, train_step), name in zip(variants, ("before", "cast")):
        for path in ("encoder.patch_embed", "encoder.blocks.0.norm1", "encoder.blocks.0", "encoder.norm",
                     "decoder.embed", "decoder.blocks.0", "decoder.norm"):
            note = lambda module, inputs, output, path=path: print(f"{name}: {path} gives {output.dtype}")
            model.get_submodule(path).register_forward_hook(note)
        train_step(feed)


if __name__ == "__main__":
    main = compare
    if sys.argv[1:2] == ["pretrain"]:
        del sys.argv[1]
        pretrain.build, main = build_cast, pretrain.main
    cmaev.run_script(main)
