"""Times the reading of one pre-training sample (two views of 16 frames) by several readers on one core.

    python -m experiments.decoding file.mp4 40          40 samples per reader (pip install torchcodec decord)
    python -m experiments.decoding file.mp4 40 112 copy170/file.mp4 copy128/file.mp4

Prints the median processor time per sample, and the median ratio to bare libav, which decodes up to the last wanted
frame and converts nothing. The other readers give PretrainClips its frames; cropping and resizing are the same.
Third argument: the side of the samples (224). Next: copies of the file (tools.shrink), read by PretrainClips. The
last two columns are clips per core, relative to PretrainClips and to torchcodec on the file itself.
"""

import statistics
import sys
import time

import av
import cmaev
import torch

try:
    import decord
    import torchcodec
except ImportError as error:
    sys.exit(f"{error}: pip install torchcodec decord")

path, rounds, times = sys.argv[1], int(sys.argv[2]), {}
size, copies = int((*sys.argv, 224)[3]), sys.argv[4:]
torch.set_num_threads(1)


def clips(path, repeats=1):
    return cmaev.PretrainClips([(path, None)], grid=(8, 14, 14), size=size, repeats=repeats)


once, four, of_copies = clips(path), clips(path, 4), {copy: clips(copy) for copy in copies}
ours = cmaev.Video.frames


def bare_libav(indices):
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for i, _ in enumerate(container.decode(video=0)):
            if i == max(indices):
                return


def by_torchcodec(video, indices):
    decoder = torchcodec.decoders.VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return dict(zip(indices, decoder.get_frames_at(indices).data))


def by_decord(video, indices):
    frames = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    return dict(zip(indices, torch.from_numpy(frames)))


def one_pass_per_view(video, indices):
    return {i: frame for view in (indices[:16], indices[16:]) for i, frame in ours(cmaev.Video(path), view).items()}


def measure(name, work):
    began = time.process_time()
    work()
    times.setdefault(name, []).append(1000 * (time.process_time() - began))


for epoch in range(rounds):
    wanted = []
    cmaev.Video.frames = lambda video, indices: wanted.extend(indices) or ours(video, indices)
    once[epoch, 0]
    measure("bare libav", lambda: bare_libav(wanted))
    readers = {"PretrainClips": ours, "one pass per view": one_pass_per_view,
               "torchcodec": by_torchcodec, "decord": by_decord}
    for name, reader in readers.items():
        cmaev.Video.frames = reader
        measure(name, lambda: once[epoch, 0])
    cmaev.Video.frames = ours
    measure("four clips", lambda: four[epoch, 0])
    for copy in copies:
        measure(copy, lambda: of_copies[copy][epoch, 0])
for name, t in times.items():
    ratio, *clips_per_core = (statistics.median(a / b for a, b in zip(t, times[other]))
                              for other in ("bare libav", "PretrainClips", "torchcodec"))
    line = "".join(f"{1 / ratio:6.2f}" for ratio in clips_per_core)
    print(f"{name:18}{statistics.median(t):7.1f} ms{ratio:6.2f}{line}")
