#!/usr/bin/env bash
# Guess: with sdpa_kernel(BACKEND) around the call of a compiled function, its attention runs with that backend, as
# without torch.compile; another backend leads to another compilation.
# Seen: the backend that was asked for at the first call is kept. No guard looks at it: under another backend the same
# code runs. Inductor's cache on disk does not know it either: a later process that asks for MATH gets the flash kernel
# that an earlier one was compiled with, until the cache is gone.
# Versions: torch 2.14.1; the first half also in 2.15.0.
# Hurts: who compares or times attention kernels under torch.compile: a test of one against the other compares a kernel
# with itself.
# Source: pytorch/pytorch issue 194007, about something else, names it in passing.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
cd "$folder"
cat > kernels.py <<'PY'
import sys
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
compiler, *backends = sys.argv[1:]
x = torch.randn(1, 2, 64, 16)


def attend(x):
    return F.scaled_dot_product_attention(x, x, x)


attend = torch.compile(attend, backend=compiler) if compiler != "none" else attend
found = []
for backend in backends:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        attend(x)
        with profile() as profiler:
            attend(x)
    names = {event.key for event in profiler.key_averages()}
    found.append("flash" if "aten::_scaled_dot_product_flash_attention_for_cpu" in names else "math")
print("torch", torch.__version__, compiler, *backends, "->", *found)
PY
export TORCHINDUCTOR_CACHE_DIR=$folder/cache TORCHINDUCTOR_COMPILE_THREADS=1
run() { "$FINDINGS_PYTHON" kernels.py "$@" 2> errors >> seen || { cat errors; exit 1; }; }
run none FLASH_ATTENTION MATH
run aot_eager FLASH_ATTENTION MATH
run aot_eager MATH FLASH_ATTENTION
run inductor FLASH_ATTENTION
run inductor MATH
cat seen
sed 's/.*-> //' seen > kernels
printf '%s\n' "flash math" "flash flash" "math math" flash flash | cmp - kernels
