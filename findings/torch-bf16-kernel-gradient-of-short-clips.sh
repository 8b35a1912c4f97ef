#!/usr/bin/env bash
# Guess: bf16 changes a convolution's gradients by rounding, 0.2 %, in any layout of memory.
# Seen: on CPUs with AVX-512, the gradient of a depthwise Conv3d's kernel is wrong by 100 % or more in bf16 with
# channels_last_3d, where the clip has at least two frames but fewer than the kernel: 2 frames and 3 x 3 x 3, 4 frames
# and 5 x 5 x 5. The output and the input's gradient are right; so are all three with contiguous memory, in float16, and
# where torch does not use AVX-512 (within 5 %: there the script passes). Nothing warns.
# Versions: torch 2.14.1 (oneDNN 3.12.0) and 2.15.0 (3.13.3), x86-64.
# Hurts: whoever trains 3-D convolutional networks on CPUs under autocast, with depthwise kernels on few frames.
# Source: oneDNN's kernels for depthwise weight gradients in bf16, called from aten/src/ATen/native/mkldnn/Conv.cpp.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
"$FINDINGS_PYTHON" - <<'PY'
import sys
import torch
import torch.nn.functional as F

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last_3d


def gradients(frames, size, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x, down = torch.randn(2, 2, 32, frames, 8, 8, generator=generator).bfloat16()
    kernel = torch.randn(32, 1, size, size, size, generator=generator).bfloat16().to(dtype).requires_grad_()
    x = x.to(dtype).to(memory_format=layout).requires_grad_()
    y = F.conv3d(x, kernel, padding=size // 2, groups=32)
    return y.detach(), *torch.autograd.grad(y, (x, kernel), down.to(dtype).to(memory_format=layout))


def errors(frames, size, dtype, layout):
    """Of the output, of the input's gradient, of the kernel's, relative to float64."""
    pairs = zip(gradients(frames, size, dtype, layout), gradients(frames, size, torch.float64, CONTIGUOUS))
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


wrong = {}
for name, dtype, layout in (("bf16 channels last", torch.bfloat16, LAST),
                            ("bf16 contiguous", torch.bfloat16, CONTIGUOUS),
                            ("fp16 channels last", torch.float16, LAST)):
    for frames, size in ((2, 3), (3, 3), (4, 5), (5, 5)):
        found = errors(frames, size, dtype, layout)
        wrong[name, frames, size] = [not error < 0.05 for error in found]  # also if it is NaN
        print(f"{name}, {frames} frames, kernel {size}: output, input's, kernel's",
              *(f"{error:.2g}" for error in found))
expected = {case: [False, False, avx512 and case[0] == "bf16 channels last" and case[1] < case[2]] for case in wrong}
sys.exit(0 if wrong == expected else "the behaviour has changed")
PY
