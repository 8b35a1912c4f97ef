"""Times ConvViT's depthwise 5 x 5 x 5 convolution in several forms, its encoders and its training step.

    python -m experiments.convvit none 1 10              precision (none: float32, or bf16), clips, rounds
    python -m experiments.convvit bf16 16 5 --step 64    on a GPU: also steps of 64 clips with each form
    python -m experiments.convvit bf16 2 1 --step 2 --encoder tiny --size 64             a quick check

Forms: ms forward, ms forward and backward, each x the project's form; the largest relative error against
float64. Encoders: forward operations per clip, seconds, x ViT. Online ones: 90 % masked, forward and back;
target ones ("all"): all tokens, forward. Steps: ms, clips/s, x ViT. All are medians, and the runs of a table
alternate. "tuned": with cudnn.benchmark. A form that fails is left out and says why.
"""

import argparse
import json
import sys
import time
from copy import deepcopy
from functools import partial
from itertools import repeat
from statistics import median

import cmaev
import pretrain
import torch
import torch.nn.functional as F
from experiments.benchmark import synthetic_batch, wait_for
from experiments.depthwise import FORMS, conv3d
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("amp", choices=["none", "bf16"])
parser.add_argument("clips", type=int)
parser.add_argument("rounds", type=int)
parser.add_argument("--step", type=int, default=0)
parser.add_argument("--encoder", default="base")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--out", help="a file for all figures, as JSON")
s = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    FORMS |= {f"{name}, tuned": FORMS[name] for name in ("conv3d", "conv2d", "time_as_channels")}
else:
    del FORMS["triton"]
vit = cmaev.build_encoder(f"vit_{s.encoder}", size=s.size).to(device)
conv = cmaev.build_encoder(f"convvit_{s.encoder}", size=s.size).to(device)
clip = torch.randn(s.clips, 3, 16, s.size, s.size, device=device)
mask = cmaev.tube_mask(s.clips, conv.grid, 0.9)
visible = cmaev.visible_and_masked(mask, device)[0]
autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=s.amp == "bf16")
figures = dict(settings=vars(s), torch=torch.__version__, device=device.type)


def whole_map(clip, visible):
    """Stages 1 and 2 on all tokens, masked before each convolution; stage 3 on visible tokens [ConvMAE]."""
    keep = (~mask).float()[..., None, None, None].to(device)

    def block(b, x):
        x = x + b.conv2(conv3d(b, b.conv1(b.norm1(x)) * keep, conv.grid, None))
        return x + b.mlp(b.norm2(x))

    x, positions = conv.visible_cubes(clip)
    tubelet, patch, _ = conv.cube
    x = x.unflatten(-1, (tubelet, 4, patch // 4, 4, patch // 4, 3)).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
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


def use_forms(masked="windows", dense="conv3d"):
    """From here on ConvViT computes by these forms, the project's by default: with a mask, on all tokens."""
    def depthwise_conv(block, x, grid, visible):
        return FORMS[dense if visible is None else masked](block, x, grid, visible)
    cmaev.ConvBlock.depthwise_conv = depthwise_conv
    torch.backends.cudnn.benchmark = "tuned" in masked + dense


def times_of(runs):
    """Seconds of each run ({name: function}) per round, alternating; without the first, which warms up."""
    runs, times = dict(runs), {}
    for _ in range(1 + s.rounds):
        for name, run in list(runs.items()):
            wait_for(device)
            began = time.perf_counter()
            try:
                run()
                wait_for(device)
            except Exception as error:  # cuDNN's, a compiler's, or out of memory: the others go on
                print(f"{name} failed: {type(error).__name__}: {str(error)[:200]}")
                del runs[name]
            else:
                times.setdefault(name, []).append(time.perf_counter() - began)
    return {name: times[name][1:] for name in runs}


def ratio(times, to):
    return median(a / b for a, b in zip(times, to))


def error_of(form, block, dtype, masked, grid=(4, 3, 3)):
    """Largest relative error against float64: of the result and its gradients by x, weight and bias."""
    visible = cmaev.visible_and_masked(cmaev.tube_mask(2, grid, 0.5))[0] if masked else None
    tokens, results = len(visible[0]) if masked else 36, []
    x = torch.randn(2, tokens, 2, 2, block.depthwise.in_channels, dtype=torch.float64)
    for form, block, x in ((form, block, x.to(device, dtype)), (conv3d, deepcopy(block).cpu().double(), x)):
        x = x.to(dtype).to(x).requires_grad_()  # rounded in both
        out = form(block, x, grid, None if visible is None else visible.to(x.device))
        grads = torch.autograd.grad(out.sum() + out.square().sum(), (x, *block.depthwise.parameters()))
        results.append([y.double().cpu() for y in (out, *grads)])
    return max(((y - exact).norm() / exact.norm()).item() for y, exact in zip(*results))


def time_forms(name, masked, block, side):
    """Prints a stage's table -> {form: seconds, of what pre-training computes}."""
    def run(form, backward):
        use_forms(form, form)
        with autocast(), torch.set_grad_enabled(backward):
            out = block.depthwise_conv(x, conv.grid, visible if masked else None)
        if backward:
            torch.autograd.grad(out, (x, *block.depthwise.parameters()), out.detach())

    tokens = len(visible[0]) if masked else conv.positions.shape[1]
    shape = s.clips, tokens, side, side, block.depthwise.in_channels
    x = torch.randn(shape, device=device, dtype=torch.bfloat16 if s.amp == "bf16" else None).requires_grad_()
    forward, both = (times_of({form: partial(run, form, backward) for form in FORMS})
                     for backward in (False, True))
    print(f"\n{name}, {list(shape)}")
    figures[name], ours = dict(forward=forward, both=both), "windows" if masked else "conv3d"
    for form in both:
        columns = [f"{1000 * median(t[form]):9.3f}{ratio(t[form], t[ours]):7.2f}" for t in (forward, both)]
        with autocast():
            error = error_of(FORMS[form], block, x.dtype, masked)
        print(f"{form:24}{''.join(columns)}{error:10.1e}", flush=True)
    return {form: median((both if masked else forward)[form]) for form in both}


def encode(encoder, visible, *forms):
    use_forms(*forms)
    with autocast(), torch.set_grad_enabled(visible is not None):
        output = encoder(clip, visible).float()
    if visible is not None:
        output.square().mean().backward()
    vit.zero_grad()
    conv.zero_grad()


def training_step(encoder):
    """Builds pretrain.py's model -> its step on synthetic clips."""
    sys.argv[1:] = ["--recipe", "k400", "--encoder", encoder, "--amp", s.amp, "--size", str(s.size),
                    "--batch-size", str(s.step)]
    settings = pretrain.read_settings()
    model, optimizer, _, step = pretrain.build(settings, device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    feed = cmaev.Feed(repeat(synthetic_batch(settings, model, s.step, device)), device)
    return lambda *forms: (use_forms(*forms), step(feed))


best = []
for masked in (True, False):
    kind = "masked" if masked else "all tokens"
    first = time_forms(f"stage 1, {kind}", masked, conv.blocks1[0], 4)
    second = time_forms(f"stage 2, {kind}", masked, conv.blocks2[0], 2)
    best.append(min(first.keys() & second, key=lambda form: first[form] + second[form]))
print(f"\nfastest in pre-training: masked {best[0]}, on all tokens {best[1]}\n")

runs = {"ViT": (vit, visible), "ConvViT": (conv, visible), "ConvViT, conv3d": (conv, visible, "conv3d"),
        "whole map": (whole_map, visible), "ViT, all": (vit, None), "ConvViT, all": (conv, None)}
if s.step:
    runs |= {f"{form}, all": (conv, None, form, form) for form in FORMS if form != "conv3d"}
figures["encoders"] = times_of({name: partial(encode, *arguments) for name, arguments in runs.items()})
use_forms()
for name, t in figures["encoders"].items():
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        runs[name][0](clip, runs[name][1])  # MATH: not all versions of torch count a CPU's fused attention
    reference = figures["encoders"]["ViT, all" if name.endswith("all") else "ViT"]
    flops = counter.get_total_flops() / 1e9 / s.clips
    print(f"{name:24}{flops:8.1f} G{median(t):8.3f} s{ratio(t, reference):7.2f}", flush=True)

if s.step:
    vit_step, conv_step = (training_step(f"{kind}_{s.encoder}") for kind in ("vit", "convvit"))
    runs = {"ViT": vit_step} | {f"windows and {form}": partial(conv_step, "windows", form) for form in FORMS}
    runs |= {f"{best[0]} and {best[1]}": partial(conv_step, *best)}
    figures["steps"] = times_of(runs)
    print(f"\nsteps of {s.step} clips: masked and all tokens by")
    for name, t in figures["steps"].items():
        rate = s.step / median(t)
        print(f"{name:36}{1000 * median(t):9.1f} ms{rate:9.1f} clips/s"
              f"{1 / ratio(t, figures['steps']['ViT']):7.2f} of ViT's")
if s.out:
    with open(s.out, "w") as file:
        json.dump(figures, file)
