"""Times the target view's colour augmentation against torchvision's transforms, applied clip by clip.

    python -m experiments.colors 16 8 48 20              clips, frames, size, rounds

Prints the median processor time per batch, and the number of operations of one batch except tensor views: about the
kernels that a GPU would launch. The draws of augment_colors are not timed: the loader's workers make them.
"""

import statistics
import sys
import time

import cmaev
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

batch, frames, size, rounds = map(int, sys.argv[1:])
torch.manual_seed(0)
clips = torch.randint(256, (batch, frames, 3, size, size), dtype=torch.uint8)
compiled = torch.compile(cmaev.augment_colors)
transforms = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2),
                         v2.RandomApply([v2.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.5)])
runs = {"augment_colors": lambda: cmaev.augment_colors(clips, colors),
        "compiled": lambda: compiled(clips, colors),
        "torchvision": lambda: torch.stack([transforms(clip) for clip in clips])}


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


times = {name: [] for name in runs}
for _ in range(1 + rounds):  # the first one warms up
    colors = torch.stack([cmaev.draw_colors() for _ in clips])
    for name, run in runs.items():
        began = time.process_time()
        run()
        times[name].append(time.process_time() - began)
for name, run in runs.items():
    line = f"{name:16}{1000 * statistics.median(times[name][1:]):8.1f} ms"
    if name != "compiled":
        with Operations() as operations:
            run()
        line += f"{operations.count:8} operations"
    print(line)
