"""Times ViT-B's and ConvViT-B's encoders, and ConvViT-B computed on the whole map as in ConvMAE.

    python -m experiments.convvit none 1 10              precision (none: float32, or bf16), clips, rounds

Prints the forward operations per clip, the median time, and the median ratio to ViT-B. Online encoders: 90 % masked,
forward and backward; target encoders ("all"): all tokens, forward.
"""

import statistics
import sys
import time

import cmaev
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

amp, batch, rounds = sys.argv[1], *map(int, sys.argv[2:])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
vit, conv = cmaev.build_encoder("vit_base").to(device), cmaev.build_encoder("convvit_base").to(device)
clip, mask = torch.randn(batch, 3, 16, 224, 224, device=device), cmaev.tube_mask(batch, (8, 14, 14), 0.9)
visible, keep = cmaev.visible_and_masked(mask, device)[0], (~mask).float()[..., None, None, None].to(device)


def block(b, x):
    whole = b.depthwise(cmaev.tokens_to_map(b.conv1(b.norm1(x)) * keep, conv.grid, None))
    x = x + b.conv2(cmaev.map_to_tokens(whole, conv.grid))
    return x + b.mlp(b.norm2(x))


def whole_map():
    """Stages 1 and 2 on all tokens, masked before each convolution; stage 3 on visible tokens [ConvMAE]."""
    x, positions = conv.visible_cubes(clip)
    x = x.unflatten(-1, (2, 4, 4, 4, 4, 3)).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
    stage1 = F.gelu(conv.embed_norms[0](conv.patch_embed1(x)))
    for b in conv.blocks1:
        stage1 = block(b, stage1)
    stage2 = F.gelu(conv.embed_norms[1](conv.patch_embed2(cmaev.merge_2x2(stage1))))
    for b in conv.blocks2:
        stage2 = block(b, stage2)
    stage3 = F.gelu(conv.embed_norms[2](conv.patch_embed3(cmaev.merge_2x2(stage2)))).flatten(1, 3)
    stage3 = cmaev.gather_tokens(conv.patch_embed4(stage3) + positions, visible)
    for b in conv.blocks3:
        stage3 = b(stage3)
    fused = conv.fusion1(stage1.flatten(2)) + conv.fusion2(stage2.flatten(2))
    return conv.norm(stage3 + cmaev.gather_tokens(fused, visible))


def whole_map_depthwise():
    """The project's encoder, with the depthwise convolution alone on the whole map."""
    def depthwise_conv(self, x, grid, visible):
        with torch.autocast("cpu", enabled=False):
            x = x.float() if device.type == "cpu" else x
            whole = self.depthwise(cmaev.tokens_to_map(x, grid, visible))
            return cmaev.gather_tokens(cmaev.map_to_tokens(whole, grid), visible)
    ours, cmaev.ConvBlock.depthwise_conv = cmaev.ConvBlock.depthwise_conv, depthwise_conv
    output = conv(clip, visible)
    cmaev.ConvBlock.depthwise_conv = ours
    return output


def target(encoder):
    with torch.no_grad():
        return encoder(clip)


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


runs = {"ViT-B": lambda: vit(clip, visible), "ConvViT-B": lambda: conv(clip, visible),
        "depthwise": whole_map_depthwise, "whole map": whole_map,
        "ViT-B, all": lambda: target(vit), "ConvViT-B, all": lambda: target(conv)}
times = {name: [] for name in runs}
for _ in range(1 + rounds):  # the first one warms up
    for name, run in runs.items():
        wait()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            output = run().float()
        if output.requires_grad:
            output.square().mean().backward()
        wait()
        times[name].append(time.perf_counter() - began)
        vit.zero_grad()
        conv.zero_grad()
for name, t in times.items():
    reference = times["ViT-B, all" if name.endswith("all") else "ViT-B"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        runs[name]()  # MATH: not all versions of torch count a CPU's fused attention
    print(f"{name:15}{counter.get_total_flops() / 1e9 / batch:7.1f} G{statistics.median(t[1:]):8.3f} s"
          f"{statistics.median(a / b for a, b in zip(t[1:], reference[1:])):6.2f}")
