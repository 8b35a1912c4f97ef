"""Times the reading of one pre-training sample (two views of 16 frames) by several readers on one core.

    python -m experiments.decoding file.mp4 40          40 samples per reader (pip install torchcodec decord)

Prints the median processor time per sample, and the median ratio to bare libav, which decodes up to the last wanted
frame and converts nothing. The other readers give PretrainClips its frames; cropping and resizing are the same.
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
torch.set_num_threads(1)
once, four = (cmaev.PretrainClips([(path, None)], grid=(8, 14, 14), repeats=n) for n in (1, 4))
ours = cmaev.Video.frames


def bare_libav(indices):
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for i, _ in enumerate(container.decode(video=0)):
            if i == max(indices):
                return


def by_torchcodec(video, indices):
    decoder = torchcodec.decoders.VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return dict(zip(indices.tolist(), decoder.get_frames_at(indices.tolist()).data))


def by_decord(video, indices):
    frames = decord.VideoReader(path, num_threads=1).get_batch(indices.tolist()).asnumpy()
    return dict(zip(indices.tolist(), torch.from_numpy(frames)))


def one_pass_per_view(video, indices):
    return {i: frame for view in indices.chunk(2) for i, frame in ours(cmaev.Video(path), view).items()}


def measure(name, work):
    began = time.process_time()
    work()
    times.setdefault(name, []).append(1000 * (time.process_time() - began))


for epoch in range(rounds):
    wanted = []
    cmaev.Video.frames = lambda video, indices: wanted.extend(indices.tolist()) or ours(video, indices)
    once[epoch, 0]
    measure("bare libav", lambda: bare_libav(wanted))
    readers = {"PretrainClips": ours, "one pass per view": one_pass_per_view,
               "torchcodec": by_torchcodec, "decord": by_decord}
    for name, reader in readers.items():
        cmaev.Video.frames = reader
        measure(name, lambda: once[epoch, 0])
    cmaev.Video.frames = ours
    measure("four clips", lambda: four[epoch, 0])
for name, t in times.items():
    ratio = statistics.median(a / b for a, b in zip(t, times["bare libav"]))
    print(f"{name:18}{statistics.median(t):7.1f} ms{ratio:6.2f}")
