"""Times the training step without the contrastive branch against Hugging Face's VideoMAE (pip install transformers).

    python -m experiments.huggingface vit_small 112 8 15 "huggingface none" "cmaev none" "huggingface bf16" "cmaev bf16"

Arguments: encoder, size, batch, rounds, then runs of library, precision (none: float32) and, optionally, "compiled".
Prints each run's median time and its median ratio to the first run. A single run also prints its peak memory.
"""

import statistics
import sys
import time

import cmaev
import torch
from experiments.benchmark import peak_memory

try:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining
except ImportError as error:
    sys.exit(f"{error}: pip install transformers")

name, size, batch, rounds, runs = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5:]
device, sizes = torch.device("cuda" if torch.cuda.is_available() else "cpu"), cmaev.ENCODERS[name][1]
clip = torch.randn(batch, 3, 16, size, size, device=device)
mask = cmaev.tube_mask(batch, (8, size // 16, size // 16), 0.9)
frames, device_mask = clip.transpose(1, 2).contiguous(), mask.to(device)


def training_step(library, amp, compiled=False):
    """Build a model -> its step: forward, backward, optimizer."""
    if library == "cmaev":
        model = cmaev.CMAEV(name, contrast_weight=0, size=size).to(device)
    else:
        width, heads = sizes["width"], sizes["heads"]
        model = VideoMAEForPreTraining(VideoMAEConfig(
            image_size=size, hidden_size=width, num_hidden_layers=sizes["depth"], num_attention_heads=heads,
            intermediate_size=4 * width, decoder_hidden_size=width // 2, decoder_intermediate_size=2 * width,
            decoder_num_attention_heads=max(1, heads // 2), attn_implementation="sdpa")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    call = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            if library == "cmaev":
                loss = call(clip, None, mask)["loss"]
            else:
                loss = call(frames, bool_masked_pos=device_mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return step


steps = {run: training_step(*run.split()) for run in runs}
times = {run: [] for run in runs}
for i in range(3 + rounds):  # the first three warm up
    for run, step in steps.items():
        began = time.perf_counter()
        step()
        times[run].append(time.perf_counter() - began)
for run in runs:
    ratio = statistics.median(a / b for a, b in zip(times[run][3:], times[runs[0]][3:]))
    print(f"{run:28}{1000 * statistics.median(times[run][3:]):9.1f} ms{ratio:6.2f}")
if len(runs) == 1:
    print(f"{'peak memory':28}{peak_memory(device):9.0f} MiB")
