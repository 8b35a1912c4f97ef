"""Each part against something independent of it: a slow loop, float64, another decoder, one process against two.

    pytest                     what a CPU can do in two minutes
    SLOW=1 pytest              all, as .ci/run: also kills, several ranks, start methods, slow films
    LONG=1 pytest -k faults    the fault tests at full length
    GPU=1 pytest -k gpu        the GPU's tests; all others run on the CPU, where results are deterministic
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest

GPU, LONG = "GPU" in os.environ, "LONG" in os.environ
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small, and processes run side by side
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, FakeTensor, FakeTensorMode, unset_fake_temporarily)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from av.bitstream import BitStreamFilterContext
from torchvision.io import write_jpeg, write_png

import cmaev
import finetune
import pretrain
from experiments import benchmark
from tools import demo_videos, export

HERE = Path(__file__).parent
on_gpu = pytest.mark.skipif(not GPU, reason="wants a GPU: GPU=1 pytest -k gpu")
slow = pytest.mark.skipif("SLOW" not in os.environ and not LONG, reason="SLOW=1 pytest")
takes_minutes = pytest.mark.skipif(not LONG, reason="takes minutes: LONG=1 pytest -k faults")
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities"),  # of write_jpeg
              pytest.mark.filterwarnings("ignore:Unable to enable fault handler")]  # pytest has taken stderr


# Helpers: files ---------------------------------------------------------------------------------------------

def write_noise(path, codec="libx264", frames=60, size=(48, 64), pixels="yuv420p", times=None, muxer={},
                title="", **options):
    """A video of moving noise, each frame unlike the others; `times`: its timestamps in 1/25 s."""
    height, width = size
    noise = np.random.default_rng(0).integers(0, 256, (height + frames, width, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=muxer) as container:
        container.metadata["title"] = title
        options = {name.replace("_", "-"): value for name, value in options.items()}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        for i, pts in enumerate(times or range(frames)):
            frame = av.VideoFrame.from_ndarray(noise[i:i + height], "rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path):
    """Every frame of the best stream, decoded from the start; errors are ignored."""
    frames, packets = [], []
    with av.open(str(path), **cmaev.ANY_METADATA) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # FFmpeg conceals damaged frames by it
        with contextlib.suppress(av.error.FFmpegError):
            packets.extend(packet for packet in container.demux(stream) if packet.size)
        for packet in (*packets, None):  # None flushes the decoder
            with contextlib.suppress(av.error.FFmpegError):
                frames += [frame.to_ndarray(format="rgb24") for frame in stream.codec_context.decode(packet)]
    return np.stack(frames)


def copy_packets(path, sources, skip=0, bits=""):
    """Copies the sources' video streams into one file, whose last one is its default.

    `skip`: the first packets to leave out; `bits`: a bit-stream filter.
    """
    with av.open(str(path), "w") as new, contextlib.ExitStack() as stack:
        old = [stack.enter_context(av.open(str(source))) for source in sources]
        streams = [new.add_stream_from_template(container.streams.video[0]) for container in old]
        for stream in streams:
            default = av.stream.Disposition.default
            stream.disposition = default if stream is streams[-1] else av.stream.Disposition(0)
        for container, stream in zip(old, streams):
            packets = [packet for packet in container.demux(video=0) if packet.size][skip:]
            if bits:
                change = BitStreamFilterContext(bits, container.streams.video[0], stream)
                packets = [new for packet in [*packets, None] for new in change.filter(packet)]
            for packet in packets:
                packet.stream = stream
                new.mux(packet)
    return path


def check_frames(path, count=None):
    """Video against decode_all: each frame alone, some with repeats, all in one read -> Video."""
    expected, video, rng = decode_all(path), cmaev.Video(path), np.random.default_rng(2)
    every = range(len(expected))
    assert len(video) == len(expected) == (count or len(expected))
    for indices in (*rng.permutation(every)[:, None], *rng.integers(0, len(expected), (4, 7)), every):
        assert np.array_equal(video.read(indices), expected[indices]), indices
    return video


def touch(root, *names):
    """Empty files, of names in text or bytes, under a folder -> the folder."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    return root


def write_list(path, videos):
    """A list file of read_list's (path, label)."""
    path.write_text("".join(f"{video} {'' if label is None else label}\n" for video, label in videos))
    return path


# Helpers: models and clips ----------------------------------------------------------------------------------

SMALL, TINY = dict(frames=4, size=(32, 48), tubelet=2, patch=16), dict(frames=4, size=32, tubelet=2, patch=8)
cmaev.ENCODERS["vit_test"] = cmaev.VisionTransformer, dict(width=64, depth=2, heads=2)
cmaev.ENCODERS["convvit_test"] = cmaev.ConvViT, dict(widths=(16, 32, 64), depths=(1, 1, 1), heads=2)
DIFFERENCES = {  # how rank 1 of two differs from rank 0: its --lr, a list, its checkpoint's step
    "": (1.0, ["a"], 4), "lr": (2.0, ["a"], 4), "lists": (1.0, ["b"], 4), "lists, lr": (2.0, ["b"], 4),
    "checkpoint.pt": (1.0, ["a"], 0)}
VIDEOS = torch.tensor([0, 1, 2, 0, 3, 0, 4, 1, 0, 5, 6, 6])  # of 12 clips, some of the same video
both_encoders = pytest.mark.parametrize("encoder", ["vit_test", "convvit_test"])
mostly_vit = pytest.mark.parametrize("encoder", ["vit_test", pytest.param("convvit_test", marks=slow)])


def small_encoder(name, **changes):
    """An encoder for clips of 4 frames of 32 x 48, without zero biases, which would hide mistakes."""
    torch.manual_seed(0)
    if name == "vit":
        model = cmaev.VisionTransformer(**dict(width=24, depth=2, heads=2) | SMALL | changes)
    else:
        model = cmaev.ConvViT(**dict(widths=(8, 12, 24), depths=(2, 1, 2), heads=2) | SMALL | changes)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def tiny_model(encoder="vit_test", batch=6, **settings):
    """A CMAEV and a batch for it: online and target clips, mask."""
    torch.manual_seed(0)
    model = cmaev.CMAEV(encoder, **settings, **TINY)
    online = F.interpolate(torch.randn(batch, 3, 4, 8, 8), (4, 32, 32), mode="trilinear")
    target = online + 0.3 * torch.randn(batch, 3, 4, 32, 32)
    return model, (online, target, cmaev.tube_mask(batch, (2, 4, 4), 0.75))


def random_features(batch):
    """Queries and keys, float64."""
    torch.manual_seed(0)
    return torch.randn(batch, 5, dtype=torch.float64), torch.randn(batch, 5, dtype=torch.float64)


def gradients(model):
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def float64():
    """The whole computation in float64, also what the module computes in float32 under AMP."""
    to_float32 = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda x: x.double() if x.ndim else to_float32(x))  # not scalers
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def train_steps(encoder, clips, micro_batch, *more):
    """Two of pretrain.py's training steps on this rank's share of `clips`, in micro-batches (0: at once).

    Gives each step's losses and gradients. A plain gradient step stands in for the optimiser's.
    """
    rank, world, steps = cmaev.this_rank(), cmaev.world_size(), []
    command = pretraining(".", "run", "--encoder", encoder, "--batch-size", clips, "--micro-batch", micro_batch,
                          "--no-color-augment", "--momentum", 0.9, *more)

    def gradient_step(parameters, optimizer, scaler, *_):
        grads = {name: grad / scaler.get_scale() for name, grad in gradients(model).items()}
        for name, grad in grads.items():
            model.get_parameter(name).data -= 0.1 * grad
        optimizer.zero_grad()
        steps.append(grads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *command])
        patch.setattr(cmaev, "optimizer_step", gradient_step)
        model, _, _, train_step = pretrain.build(pretrain.read_settings(), torch.device("cpu"))
        _, (online, target, mask) = tiny_model(batch=clips)
        pixels = lambda x: (255 * cmaev.to_unit_range(x).clamp(0, 1)).byte().transpose(1, 2)
        batch = dict(online=pixels(online), target=pixels(target), mask=mask, video_index=VIDEOS[:clips],
                     replaced=torch.zeros(clips, dtype=torch.bool))
        parts = {name: x.chunk(world)[rank].split(micro_batch or clips // world) for name, x in batch.items()}
        micro_batches = [dict(zip(parts, rows)) for rows in zip(*parts.values())]
        losses = [train_step(iter(micro_batches))[0] for _ in range(2)]
    values = [{name: x[name].item() for name in pretrain.METRICS} for x in losses]
    return list(zip(values, steps, strict=True))


def assert_close_gradients(grads, expected, rtol=1e-4, atol=1e-6):
    """`atol` is relative to the largest gradient."""
    assert grads.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=rtol, atol=atol * scale, msg=lambda m: f"{name}: {m}")


def pretrain_clips(demo, **changes):
    settings = dict(frames=4, rate=2, max_shift=4, size=32, mask_ratio=0.75, seed=3) | changes
    return cmaev.PretrainClips(cmaev.read_list(demo / "train.txt"), (2, 4, 4), **settings)


# Helpers: the scripts, and processes ------------------------------------------------------------------------

def pretraining(demo, out, *more):
    """The arguments of a run of pretrain.py: 20 steps on 40 videos."""
    usual = """--recipe demo --encoder vit_tiny --frames 4 --size 32 --patch 8 --mask-ratio 0.75 --max-shift 4
        --batch-size 8 --epochs 4 --warmup-epochs 1 --log-every 4 --save-every 3 --picture-every 0 --amp none
        --workers 0"""
    return [*usual.split(), "--data", f"{demo}/train.txt", "--out", str(out), *map(str, more)]


def finetuning(demo, out, *more):
    """The arguments of a run of finetune.py: 9 steps on 30 of 40 videos, the others being held out."""
    usual = """--recipe demo --frames 4 --size 32 --patch 8 --batch-size 8 --epochs 3 --amp none --warmup-epochs 1
        --log-every 2 --save-every 3 --val-every 1 --mixup 0.8 --cutmix 1 --rand-augment --erasing 0.25 --repeats 2
        --segments 2 --crops 2 --workers 0"""
    return [*usual.split(), "--data", f"{demo}/train.txt", "--out", str(out), *map(str, more)]


def run(script, *arguments):
    """A script's main in this process -> None, or the line or the code that it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            cmaev.run_script(script.main)
        except SystemExit as end:
            return str(end)


def start(script, *arguments, **how):
    """A script as a process of its own."""
    command = [sys.executable, HERE / f"{script.__name__}.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how)


def wait_for(condition, process, seconds=120):
    """Waits until a condition holds -> whether the process still runs."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return process.poll() is None


def children(process):
    """The numbers of the processes that a process has started."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def all_ended(*groups, seconds=30):
    """Whether the processes of these groups end: decoders ask every 5 s whether their trainer lives."""
    deadline, command = time.monotonic() + seconds, ["pgrep", "-g", ",".join(map(str, groups))]
    while subprocess.run(command, capture_output=True).stdout:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def log_of(run):
    """A run's log without what differs between machines."""
    measured = {"seconds", "step_ms", "clips_per_s", "memory_mib", "data_wait"}
    return [{name: x for name, x in line.items() if name not in measured} for line in cmaev.read_log(run)]


def assert_same_weights(run, expected, name="checkpoint.pt"):
    weights, expected = (torch.load(folder / name, weights_only=True)["model"] for folder in (run, expected))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def assert_same_but_for_rounding(run, expected):
    """Ranks add up in another order than one process, and DDP in another in the first step after a start."""
    for line, expected_line in zip(log_of(run), log_of(expected), strict=True):
        assert line == pytest.approx(expected_line, rel=1e-3)
    weights, expected = checkpoint_of(run)["model"], checkpoint_of(expected)["model"]
    for name, value in expected.items():
        if not name.endswith((".0.bias", "qkv.bias")):  # a gradient of rounding alone, which Adam scales up
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=lambda m: f"{name}: {m}")


def usage(process="self"):
    """Resident memory in MiB and number of open files of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return np.array([pages * 4 / 1024, len(os.listdir(f"/proc/{process}/fd"))])


# Fixtures ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo"
    demo_videos.make_demo(folder, train=40, val=10)
    return folder


@pytest.fixture(scope="module")
def undisturbed(demo):
    """A run of pretrain.py from start to end."""
    folder = demo.parent / "undisturbed"
    assert run(pretrain, *pretraining(demo, folder)) is None
    return folder


@pytest.fixture(scope="module")
def tuned(demo, undisturbed):
    """A run of finetune.py from start to end, tested on the videos that it holds out."""
    folder = demo.parent / "tuned"
    assert run(finetune, *finetuning(demo, folder, "--init", undisturbed)) is None
    return folder


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of videos, lists and weights, most of which cannot be used."""
    folder = touch(tmp_path_factory.mktemp("wrong"), "nothing/notes.txt", "empty.txt")
    write_noise(folder / "good.mp4", frames=3)
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame) + stream.encode(None))
    good, audio = "good.mp4 0\n", "audio.mp4 0\n"
    for name, text in {
            "text.mp4": "no video", "good.txt": 8 * good, "one.txt": good, "audio.txt": audio,
            "text.txt": "text.mp4 0\n", "gone.txt": good + "lost.mp4 1\n", "label.txt": "good.mp4 jump\n",
            "large.txt": "good.mp4 7\n", "gap.txt": good + "good.mp4 2\n", "none.txt": "good.mp4\n",
            "late.txt": good + 7 * audio, "huge.txt": f"{good}good.mp4 {10**20}\n"}.items():
        (folder / name).write_text(text)
    for name, content in {"other": {"model": {"a": torch.ones(1), 1: torch.ones(1)}},
                          "no-tensors": {"model": {}, "epoch": 3}, "tensor": torch.ones(1)}.items():
        torch.save(content, folder / f"{name}.pt")
    np.savez(folder / "array.npz", np.ones(1))
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks have left in a folder: see work_as_rank. Forked, as an import of torch takes seconds."""
    folder, fork = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work_as_rank, args=(rank, folder), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder


def work_as_rank(rank, folder):
    """A backward pass of this rank's half of a batch; three steps, of which rank 1 spoils the second; and so on."""
    torch.set_num_threads(1)  # OpenMP's other threads are not forked
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    save = lambda content, name: torch.save(content, folder / f"{name}-{rank}.pt")
    steps, errors, cpu = [], [], torch.device("cpu")
    for encoder in ("convvit_test", "vit_test"):
        model, batch = tiny_model(encoder, batch=8)
        half, parallel = [x.chunk(2)[rank] for x in batch], cmaev.data_parallel(model)
        assert not parallel.broadcast_buffers  # the constant position tables
        losses = parallel(*half)
        losses["loss"].backward()
        sums = cmaev.sum_over_ranks(torch.stack([losses[name].detach() for name in pretrain.METRICS]))
        means = dict(zip(pretrain.METRICS, (sums / 2).tolist()))
        save((means, gradients(model)), encoder)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), cmaev.grad_scaler(None, cpu)
    for factor in (1, math.nan if rank == 1 else 1, 1):
        optimizer.zero_grad()
        scaler.scale(parallel(*half)["loss"] * factor).backward()
        grad_norm = cmaev.optimizer_step(model.parameters(), optimizer, scaler, None)
        steps.append((bool(grad_norm.isfinite()), model.decoder.head.weight.detach().clone()))
    save(steps, "steps")
    with float64():
        for encoder in ("convvit_test", "vit_test"):
            for weight in (0.0, 0.14):
                taken = train_steps(encoder, 12, 2, "--contrast-weight", weight)
                save([grads for _, grads in taken], f"{encoder}-{weight}")
        query, key, video = (x.chunk(2)[rank] for x in (*random_features(8), VIDEOS[:8]))
        save([float(x) for x in cmaev.info_nce(query, key, 0.07, video)], "info_nce")
    for name, of_rank_1 in DIFFERENCES.items():
        lr, listed, step = of_rank_1 if rank else DIFFERENCES[""]
        disk = folder / f"disk {rank} {name}"  # of its own
        disk.mkdir()
        state = dict(model=torch.nn.Linear(1, 1), meter=cmaev.Meter([], cpu))
        if step:
            saved = {name: holder.state_dict() for name, holder in state.items()}
            torch.save(dict(saved, step=step), disk / "checkpoint.pt")
        try:
            cmaev.check_ranks(argparse.Namespace(amp="none", lr=lr, workers=rank), cpu, listed)
            errors.append(cmaev.resume(disk, state))
        except cmaev.CMAEVError as error:
            errors.append(str(error))
    save(errors, "errors")
    torch.distributed.destroy_process_group()


# 1  Tokens and tube mask ------------------------------------------------------------------------------------

def test_normalize_and_its_inverse():
    clips = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    x = cmaev.normalize(clips)
    assert x.shape == (2, 3, 4, 8, 8)
    expected = (int(clips[1, 3, 2, 4, 5]) / 255 - 0.406) / 0.225
    assert float(x[1, 2, 3, 4, 5]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(cmaev.to_unit_range(x), clips.transpose(1, 2) / 255)


@pytest.mark.parametrize("ratio, masked", [(0.9, 176), (0.75, 147), (0.5, 98), (0.95, 186)])
def test_tube_mask_and_its_indices(ratio, masked):
    mask = cmaev.tube_mask(500, (8, 14, 14), ratio, torch.Generator().manual_seed(0))
    tubes = mask.view(500, 8, 196)
    assert mask.dtype == torch.bool and (tubes == tubes[:, :1]).all() and (tubes.sum(dim=2) == masked).all()
    share = tubes[:, 0].float().mean(dim=0)  # each position as often as any other: five standard deviations
    assert (share - masked / 196).abs().max() < 5 * math.sqrt(masked / 196 * (1 - masked / 196) / 500)
    visible, hidden = cmaev.visible_and_masked(mask[:3])
    tokens = torch.arange(3 * 1568 * 5.).view(3, 1568, 5)
    for b in range(3):
        assert visible[b].tolist() == [n for n in range(1568) if not mask[b, n]]
        assert hidden[b].tolist() == [n for n in range(1568) if mask[b, n]]
        assert torch.equal(cmaev.gather_tokens(tokens, hidden)[b], tokens[b][mask[b]])


# 2  Encoders ------------------------------------------------------------------------------------------------

def float64_vit(state, clip, heads):
    """The classifier of a ViT in float64, with a convolution and without fused attention."""
    w = {name.removeprefix("encoder."): value.double() for name, value in state.items()}
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    x = F.conv3d(clip.double(), kernel, bias, stride=kernel.shape[2:]).flatten(2).mT
    for n, d in np.ndindex(x.shape[1:]):
        x[:, n, d] += (math.cos if d % 2 else math.sin)(n / 10000 ** (2 * (d // 2) / len(kernel)))
    for block in ("blocks.0.", "blocks.1."):
        qkv, attended = linear(norm(x, block + "norm1"), block + "attn.qkv"), []
        for q, k, v in zip(*(part.chunk(heads, dim=2) for part in qkv.chunk(3, dim=2))):
            weights = (q @ k.mT / math.sqrt(q.shape[2])).exp()
            attended.append(weights @ v / weights.sum(dim=2, keepdim=True))
        x = x + linear(torch.cat(attended, dim=2), block + "attn.proj")
        hidden = linear(norm(x, block + "norm2"), block + "mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, block + "mlp.fc2")
    return linear(norm(x.mean(dim=1), "fc_norm"), "head").float()


def test_vit_equals_float64():
    """Positions, cube embedding, attention and all else, in the classifier of fine-tuning."""
    model, clip = finetune.Classifier(small_encoder("vit"), "abcde").eval(), torch.randn(2, 3, 4, 32, 48)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    expected = float64_vit(model.state_dict(), clip, heads=2)
    torch.testing.assert_close(model(clip), expected, rtol=1e-4, atol=1e-4)


def dense_convvit(model, clip, mask):
    """ConvMAE as published, in 3-D: whole maps [B, C, T, H, W], masked positions zero before a convolution."""
    (t, p, _), keep, outputs, x = model.cube, ~mask, [], clip
    last = lambda f, x: f(x.movedim(1, -1)).movedim(-1, 1)
    fold = lambda linear, s: (linear.weight.unflatten(1, (1, s, s, -1)).movedim(-1, 1), linear.bias)
    tokens = lambda x: x.flatten(2).mT[keep].view(len(x), -1, x.shape[1])
    embeddings = [((model.patch_embed1.proj.weight, model.patch_embed1.proj.bias), (t, p // 4, p // 4)),
                  (fold(model.patch_embed2, 2), (1, 2, 2)), (fold(model.patch_embed3, 2), (1, 2, 2))]
    for (kernel, stride), norm, blocks, s in zip(
            embeddings, model.embed_norms, (model.blocks1, model.blocks2, []), (4, 2, 1)):
        x = F.gelu(last(norm, F.conv3d(x, *kernel, stride=stride)))
        visible = keep.view(len(x), 1, *model.grid).repeat_interleave(s, 3).repeat_interleave(s, 4)
        for block in blocks:
            y, conv = visible * last(block.conv1, last(block.norm1, x)), block.depthwise
            y = F.conv3d(y, conv.weight, conv.bias, padding=2, groups=y.shape[1])
            x = x + last(block.conv2, y)
            x = x + last(block.mlp, last(block.norm2, x))
        outputs.append(x)
    x = tokens(last(model.patch_embed4, x) + model.positions.mT.unflatten(2, model.grid))
    for block in model.blocks3:
        x = block(x)
    for stage, fusion, s in ((outputs[0], model.fusion1, 4), (outputs[1], model.fusion2, 2)):
        x = x + tokens(F.conv3d(stage, *fold(fusion, s), stride=(1, s, s)))
    return model.norm(x)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("frames", [2, 4, 12])  # one time step; fewer and more than a kernel reaches
def test_convvit_equals_the_dense_masked_computation(frames, masked):
    model, clip = small_encoder("convvit", frames=frames), torch.randn(2, 3, frames, 32, 48)
    mask = cmaev.tube_mask(2, model.grid, 0.5) if masked else torch.zeros(2, 3 * frames, dtype=torch.bool)
    visible = cmaev.visible_and_masked(mask)[0] if masked else None
    outputs = model(clip, visible), dense_convvit(model, clip, mask)
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(output.square().sum(), list(model.parameters())) for output in outputs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_masked_pixels_reach_no_visible_token():
    """Of a ViT; for ConvViT the dense computation says so."""
    model, clip = small_encoder("vit"), torch.randn(2, 3, 4, 32, 48)
    mask, noise = cmaev.tube_mask(2, model.grid, 0.5), torch.randn(2, 12, 1536)
    visible, _ = cmaev.visible_and_masked(mask)
    noise_in = lambda where: cmaev.uncubes(where[..., None] * noise, model.grid, (4, 32, 48))
    tokens = model(clip, visible)
    assert tokens.shape == (2, 6, 24) and torch.equal(tokens, model(clip + 9 * noise_in(mask), visible))
    assert not torch.equal(tokens, model(clip + noise_in(~mask), visible))


@pytest.mark.parametrize("name, millions, flops", [("vit_base", 87, 563e9), ("convvit_base", 85, 697e9)])
def test_sizes_and_operations(name, millions, flops):
    """Table 1's parameters; the operations of a step per clip, worked out by hand."""
    with torch.device("meta"):
        model, encoder = cmaev.CMAEV(name), cmaev.build_encoder(name, fusion=False)
        classifier = finetune.Classifier(encoder, range(400))
    assert round(sum(p.numel() for p in classifier.parameters()) / 1e6) == millions
    assert benchmark.clip_flops(model, 0.9) == pytest.approx(flops, rel=0.015)


def test_initialisation_of_convvit():
    """Convolutions: uniform within 1 / sqrt(inputs). Linear layers: within sqrt(6 / (inputs + outputs))."""
    for name, p in cmaev.build_encoder("convvit_tiny", fusion=False).named_parameters():
        assert "fusion" not in name
        if p.ndim > 1:
            inputs, outputs = p[0].numel(), len(p)
            linear = name.startswith(("patch_embed3", "patch_embed4", "blocks3"))
            bound = math.sqrt(6 / (inputs + outputs)) if linear else 1 / math.sqrt(inputs)
            assert 0.9 * bound < p.abs().max() <= bound, name


# 3  Decoder and heads ---------------------------------------------------------------------------------------

def test_decoder_predicts_the_masked_tokens_in_order():
    """Swapping the positions of two masked tokens swaps their predictions, and changes no other."""
    encoder = small_encoder("vit")
    encoder.width = 128
    decoder, mask = cmaev.PixelDecoder(encoder, depth=1), cmaev.tube_mask(1, encoder.grid, 0.5)
    tokens, (visible, masked) = torch.randn(1, 6, 128), cmaev.visible_and_masked(mask)
    before = decoder(tokens, visible, masked)
    assert before.shape == (1, 6, 1536)
    a, b = masked[0, 1], masked[0, 4]
    decoder.positions[:, [a, b]] = decoder.positions[:, [b, a]].clone()
    torch.testing.assert_close(decoder(tokens, visible, masked), before[:, [0, 4, 2, 3, 1, 5]])


def test_batch_norm_equals_torch():
    x = torch.randn(9, 6) * 3 + 2
    torch.testing.assert_close(cmaev.GlobalBatchNorm(6)(x), F.batch_norm(x, None, None, training=True))


# 4  Losses --------------------------------------------------------------------------------------------------

class TF32(TorchDispatchMode):
    """Rounds the factors of float32 products to 10 bits of mantissa, as a GPU does in training."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function):
            args = [x.half().float() if x.dtype is torch.float32 else x for x in args]
        return function(*args, **(kwargs or {}))


def slow_info_nce(query, key, video):
    """Each query's loss, and whether its positive is the most similar key, by loops; temperature 0.07."""
    losses, right = [], []
    for i in range(len(query)):
        rho = {j: float(query[i] @ key[j] / query[i].norm() / key[j].norm()) for j in range(len(key))
               if i == j or video[i] != video[j]}
        losses.append(math.log(sum(math.exp(r / 0.07) for r in rho.values())) - rho[i] / 0.07)
        right.append(max(rho, key=rho.get) == i)
    return losses, right


@pytest.mark.parametrize("amp", [False, True])
def test_info_nce_against_loops(two_ranks, amp):
    """Float32 also under AMP and where a GPU multiplies in TF32. Clips of the same video are no negatives."""
    query, key = random_features(8)
    for video in (None, VIDEOS[:8]):
        losses, right = slow_info_nce(query, key, range(8) if video is None else video.tolist())
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), TF32():
            whole = [float(x) for x in cmaev.info_nce(query, key, 0.07, video)]
        assert whole == pytest.approx([np.mean(losses), np.mean(right)], rel=1e-5)
    for rank, rows in enumerate((slice(4), slice(4, 8))):
        of_rank = torch.load(two_ranks / f"info_nce-{rank}.pt")
        assert of_rank == pytest.approx([np.mean(losses[rows]), np.mean(right[rows])])


@pytest.mark.parametrize("amp", [False, True])
def test_reconstruction_loss_against_loops(amp):
    """VideoMAE's target: per cube and channel, unbiased, epsilon outside the root."""
    clip, grid, errors = torch.rand(2, 3, 4, 32, 48, dtype=torch.float64), (2, 2, 3), []
    clip[0, 0, :2] = 0.485 + 1e-6 * clip[0, 0, :2]  # so flat that the epsilon matters
    mask, prediction = cmaev.tube_mask(2, grid, 0.5), torch.randn(2, 6, 1536, dtype=torch.float64)
    for b in range(2):
        for m, n in enumerate(np.flatnonzero(mask[b])):
            t, i, j = np.unravel_index(n, grid)
            tube = clip[b, :, 2 * t:2 * t + 2, 16 * i:16 * i + 16, 16 * j:16 * j + 16]
            for c in range(3):
                cube, predicted = tube[c].reshape(-1).tolist(), prediction[b, m, c::3].tolist()
                mean = sum(cube) / 512
                std = math.sqrt(sum((v - mean) ** 2 for v in cube) / 511)
                errors += [(p - (v - mean) / (std + 1e-6)) ** 2 for p, v in zip(predicted, cube)]
    normalized, (_, masked) = cmaev.normalize(255 * clip.transpose(1, 2)), cmaev.visible_and_masked(mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = cmaev.reconstruction_loss(prediction.float(), normalized.float(), masked, grid)
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)


# 5  CMAE-V --------------------------------------------------------------------------------------------------

def test_calls_that_cannot_work_say_what_is_expected(demo):
    model, (online, target, mask) = tiny_model()
    convvit, no_tubes = tiny_model("convvit_test")[0], torch.arange(32).expand(6, -1) % 5 < 2
    for call, words in {
            lambda: model(online[:1], target[:1], mask[:1]): "two or more clips",
            lambda: model(online, target.byte(), mask): "torch.uint8 [6, 3, 4, 32, 32], the encoder takes",
            lambda: model.encoder(online.transpose(1, 2)): "[6, 4, 3, 32, 32], the encoder takes float32 [6",
            lambda: cmaev.normalize(torch.zeros(4, 32, 32, 3)): "give the frames [T, H, W, 3] of Video.read",
            lambda: cmaev.normalize(online): "normalize takes [B, T, 3, H, W]",
            lambda: cmaev.PretrainClips(demo, (2, 4, 4)): "give read_list(path)",
            lambda: finetune.TestViews([], 4, 4, 32, "often"): "give 'dense' or 'uniform'",
            lambda: demo_videos.make_demo(demo.parent / "new", "typo"): "choose from scenes, motions, looks",
            lambda: demo_videos.make_demo(demo): f"{demo} is not empty",
            lambda: model(online, target, mask[:, 1:]): "bool [B, N]",
            lambda: model(online, target, mask.float()): "bool [B, N]",
            lambda: model(online, target, mask[1:]): "torch.int64 [5, 8], the encoder takes int64 [6, N_v]",
            lambda: model.encoder(online, mask): "visible is torch.bool [6, 32], the encoder takes int64",
            lambda: convvit(online, target, no_tubes): "masked at every time step",
            lambda: convvit.reconstruct(online, no_tubes): "masked at every time step",
            lambda: pretrain_clips(demo)[0]: "[epoch, index]",
            lambda: pretrain_clips(demo, mask_ratio=1.0): "mask ratio 1.0",
            lambda: cmaev.temporal_shift_indices(0, 16, 4, 8): "num_frames=0"}.items():
        with pytest.raises(cmaev.CMAEVError, match=re.escape(words)) as raised:
            call()
        assert not isinstance(raised.value, cmaev.BadVideo)


@both_encoders
def test_equation_8_trains_all_but_the_target_which_follows(encoder):
    model, (online, target, mask) = tiny_model(encoder, contrast_weight=0.5)
    losses = model(online, target.requires_grad_(), mask)
    losses["loss"].backward()
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + 0.5 * losses["contrast"])
    assert target.grad is None
    before = {name: p.clone() for name, p in model.named_parameters()}
    targets = [name for name in before if name.startswith("target")]
    assert all((p.grad is None) == (name in targets) for name, p in model.named_parameters())
    alone, _ = tiny_model(encoder, contrast_weight=0.0)
    assert not any("target" in name or "project" in name for name in alone.state_dict())
    alone.load_state_dict(model.state_dict(), strict=False)
    assert alone(online, None, mask)["loss"] == losses["reconstruction"]
    for p in model.parameters():
        p.data += torch.randn_like(p) * p.requires_grad
    model.update_target(0.9)
    sources = [name for name in before if name.startswith(("encoder.", "projector."))]
    assert targets == [f"target_{name}" for name in sources]
    for name, source in zip(targets, sources):
        assert torch.equal(before[name], before[source])  # it begins as a copy
        expected = 0.9 * before[name] + 0.1 * model.get_parameter(source)
        torch.testing.assert_close(model.get_parameter(name), expected)


@both_encoders
@pytest.mark.parametrize("weight", [0.0, 0.14])
def test_micro_batches_have_the_gradient_of_the_whole_batch(two_ranks, encoder, weight):
    """In two steps with a momentum step between them, by one process; and by two ranks with three parts each."""
    with float64():
        expected = train_steps(encoder, 12, 0, "--contrast-weight", weight)
        for micro_batch in (1, 2, 6):
            steps = train_steps(encoder, 12, micro_batch, "--contrast-weight", weight)
            for (losses, grads), (expected_losses, expected_grads) in zip(steps, expected, strict=True):
                assert losses == pytest.approx(expected_losses, rel=1e-9)
                assert_close_gradients(grads, expected_grads, rtol=1e-9, atol=1e-12)
        if weight:  # the target follows
            fixed = train_steps(encoder, 12, 0, "--contrast-weight", weight, "--momentum", 1)
            assert fixed[0][0] == expected[0][0] and fixed[1][0]["contrast"] != expected[1][0]["contrast"]
        for rank in range(2):
            steps = torch.load(two_ranks / f"{encoder}-{weight}-{rank}.pt")
            for grads, (_, expected_grads) in zip(steps, expected, strict=True):
                assert_close_gradients(grads, expected_grads, rtol=1e-9, atol=1e-12)


@both_encoders
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("weight", [0.0, 0.14])
def test_gradients_under_amp(encoder, amp, weight):
    """Of the whole batch and of micro-batches; float16 with a loss scale that it needs.

    Without contrast, whose batch norm magnifies rounding, each parameter's on its own: oneDNN's bf16 gradient
    of a depthwise convolution was wrong by 100 %.
    """
    grads = []
    for more in ((0,), (0, "--amp", amp), (2, "--amp", amp)):
        (_, first), _ = train_steps(encoder, 6, *more, "--contrast-weight", weight)
        grads.append(first.values())
    exact, *others = grads
    norms = torch.stack([grad.norm() for grad in exact])
    whole, parts = (torch.stack([(x - y).norm() for x, y in zip(other, exact, strict=True)]) for other in others)
    assert parts.norm() < 1.5 * whole.norm() < 0.5 * norms.norm()
    assert weight or (whole < 0.1 * norms + 0.003 * norms.max()).all()


@mostly_vit
def test_overfits_one_batch(encoder):
    model, batch = tiny_model(encoder)
    optimizer = torch.optim.AdamW(cmaev.decay_groups(model, 0.05), lr=1e-2, fused=True)
    first = model(*batch)
    for _ in range(80):
        losses = model(*batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(0.99)
    assert losses["reconstruction"] < 0.35 * first["reconstruction"]
    assert losses["contrast"] < 0.2 * first["contrast"] and losses["accuracy"] == 1


@mostly_vit
def test_compiles_into_a_few_graphs_once(encoder):
    model, graphs = tiny_model(encoder)[0], []
    model.decoder.blocks = model.decoder.blocks[:1]
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(3):
        batch = *torch.randn(2, 2, 3, 4, 32, 32), cmaev.tube_mask(2, (2, 4, 4), 0.75)
        losses = compiled(*batch)
        losses["loss"].backward()
        torch.testing.assert_close(losses["loss"], model(*batch)["loss"])
    assert len(graphs) <= 2
    augment = torch.compile(cmaev.augment_colors, fullgraph=True, backend="eager")
    clips = torch.randint(0, 256, (5, 2, 3, 16, 16), dtype=torch.uint8)
    colors = cmaev.draw_colors().expand(5, -1)
    assert torch.equal(augment(clips, colors), cmaev.augment_colors(clips, colors))


def test_reconstruct_pastes_what_is_visible():
    model, (online, _, mask) = tiny_model()
    original, masked, means, filled = model.reconstruct(online, mask)
    hidden = cmaev.uncubes(mask[..., None].expand(-1, -1, 2 * 8 * 8 * 3), (2, 4, 4), (4, 32, 32))
    assert all(torch.equal(row[~hidden], original[~hidden]) for row in (masked, means, filled))
    mean_color = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1).expand_as(masked)
    assert torch.equal(masked[hidden], mean_color[hidden])
    assert (filled[hidden] != original[hidden]).float().mean() > 0.5
    unclamped = cmaev.cubes(cmaev.to_unit_range(online), (2, 4, 4)).unflatten(-1, (-1, 3)).mean(dim=2)
    of_cubes = cmaev.cubes(means, (2, 4, 4)).unflatten(-1, (-1, 3))
    torch.testing.assert_close(of_cubes[mask], unclamped[mask].clamp(0, 1)[:, None].expand_as(of_cubes[mask]))


# 6  The two views -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_frames, frames, rate, max_shift", [
    (100, 16, 4, 8), (66, 16, 4, 8), (40, 16, 4, 8), (1, 16, 4, 0), (35, 16, 2, 4), (20, 4, 1, 16)])
def test_temporal_shift_indices(num_frames, frames, rate, max_shift):
    """All possible (t1, delta) are drawn, no others, as often as they should; indices by the paper's formula."""
    possible, drawn, generator = {}, {}, torch.Generator().manual_seed(0)
    for delta in range(max_shift + 1):
        starts = [t for t in range(num_frames) if t + (frames - 1) * rate + delta < num_frames] or [0]
        for t in starts:
            views = [t + shift + i * rate for shift in (0, delta) for i in range(frames)]
            views = tuple(min(i, num_frames - 1) for i in views)
            possible[views] = possible.get(views, 0) + 1 / (max_shift + 1) / len(starts)
    draws = 40 * len(possible) + 2000
    for _ in range(draws):
        views = cmaev.temporal_shift_indices(num_frames, frames, rate, max_shift, generator)
        views = tuple(torch.cat(views).tolist())
        drawn[views] = drawn.get(views, 0) + 1
    assert drawn.keys() == possible.keys()
    chi2 = sum((drawn[v] - draws * p) ** 2 / (draws * p) for v, p in possible.items())
    assert chi2 < len(possible) + 5 * math.sqrt(2 * len(possible)) + 5  # mean and five standard deviations


def test_multi_scale_crop():
    generator = torch.Generator().manual_seed(0)
    drawn = {cmaev.multi_scale_crop(100, 160, generator) for _ in range(4000)}
    sides = [100, 87, 75, 66]
    expected = {(h, w) for i, h in enumerate(sides) for w in sides[max(i - 1, 0):i + 2]}
    assert {(h, w) for _, _, h, w in drawn} == expected
    for h, w in expected:
        y, x = (100 - h) / 4, (160 - w) / 4
        quarters = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2),  # corners, centre, edge middles, quarter points
                    (0, 2), (2, 0), (2, 4), (4, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
        places = {(top, left) for top, left, *size in drawn if size == [h, w]}
        assert places == {(int(a * y), int(b * x)) for a, b in quarters}


def test_sample_against_a_plain_decode(demo):
    """Views are a resized crop of the frames that the sample names; colours are the same for all frames."""
    clips, epoch, index = pretrain_clips(demo, repeats=10), 5, 7
    sample, frames = clips[epoch, index], torch.from_numpy(decode_all(clips.videos[index][0])).movedim(-1, 1)
    with cmaev.seeded(3, epoch, index) as generator:
        indices = [cmaev.temporal_shift_indices(48, 4, 2, 4, generator) for _ in range(10)]
        crops = [cmaev.multi_scale_crop(96, 96, generator) for _ in range(10)]
    for r, (views, (top, left, h, w)) in enumerate(zip(indices, crops)):
        for view, name in zip(views, ("online", "target")):
            cropped = frames[view, :, top:top + h, left:left + w].float()
            expected = F.interpolate(cropped, (32, 32), mode="bilinear", antialias=True)
            assert (sample[name][r].float() - expected).abs().max() <= 1  # uint8 rounding
    assert len({str(view) for views in indices for view in views}) > 10  # clips differ, views are shifted
    assert sample["mask"].shape == (10, 32) and (sample["mask"].sum(dim=1) == 24).all()
    assert sample["video_index"].tolist() == 10 * [index]
    assert len({str(draw) for draw in sample["colors"].tolist()}) > 6  # some change nothing
    stills = sample["target"][:, :1].expand(-1, 4, -1, -1, -1)
    colored = cmaev.augment_colors(stills, sample["colors"])
    assert (colored == colored[:, :1]).all()
    torch.testing.assert_close(cmaev.augment_colors(stills[5:7], sample["colors"][5:7]), colored[5:7])
    both, one = pretrain_clips(demo)[2, 3], pretrain_clips(demo, two_views=False)[2, 3]
    assert one.keys() == {"online", "mask", "replaced"}
    assert all(torch.equal(both[name], one[name]) for name in one)


def test_samples_do_not_depend_on_workers_ranks_or_restarts(demo):
    def batches(steps=7, world=1, start=0, parts=1):
        """The keys of all ranks' micro-batches, joined for each step."""
        of_ranks = []
        for rank in range(world):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cmaev, "this_rank", lambda: rank)
                patch.setattr(cmaev, "world_size", lambda: world)
                of_ranks.append(list(cmaev.batches(40, 8, steps, 0, start, parts)))
        return [sum((keys for of_rank in of_ranks for keys in of_rank[i:i + parts]), [])
                for i in range(0, len(of_ranks[0]), parts)]

    whole = batches()
    assert whole == batches(world=2) == batches(world=2, parts=2) and whole[3:] == batches(start=3)
    keys = sum(batches(steps=10), [])
    for epoch in range(2):
        assert sorted(keys[40 * epoch:40 * epoch + 40]) == [(epoch, i) for i in range(40)]
    assert [i for _, i in keys[:40]] != [i for _, i in keys[40:]]
    clips = pretrain_clips(demo, repeats=2)
    loaded, before = list(DataLoader(clips, batch_sampler=whole[4:], num_workers=2)), torch.get_rng_state()
    for batch, keys in zip(loaded, whole[4:], strict=True):
        for i, key in reversed(list(enumerate(keys))):
            assert all(torch.equal(x, batch[name][i]) for name, x in clips[key].items())
    assert torch.equal(torch.get_rng_state(), before)


def torchvision_colors(clip, brightness, contrast, saturation, hue, sigma):
    """The same factors by torchvision's functions, one after the other; float [T, 3, S, S] in 0 to 255."""
    f, clip = cmaev.v2.functional, clip / 255
    clip = f.adjust_contrast(f.adjust_brightness(clip, brightness), contrast)
    clip = f.adjust_hue(f.adjust_saturation(clip, saturation), hue)
    return 255 * f.gaussian_blur(clip, [13, 13], [sigma, sigma])


def our_colors(clips, *factors):
    colors = cmaev.color_parameters(*(torch.tensor(float(factor)) for factor in factors))
    return cmaev.augment_colors(clips, colors.expand(len(clips), -1))


@pytest.mark.parametrize("factors, tolerance", [
    ((1.3, 1, 1, 0, 0.01), 0.1), ((1, 0.7, 1, 0, 0.01), 0.2), ((1, 1.3, 1, 0, 0.01), 0.2), ((1, 1, 0.6, 0, 0.01), 0.2),
    ((1, 1, 0, 0, 0.01), 0.2), ((1, 1, 1, 0, 1.7), 0.1), ((1.2, 0.8, 0.7, 0, 0.5), 0.3)])
def test_each_color_factor_is_torchvisions(factors, tolerance):
    """On frames alike and without clamping; the hue: in the next test."""
    clips = torch.randint(90, 150, (2, 1, 3, 32, 32), dtype=torch.uint8).expand(-1, 4, -1, -1, -1)
    for ours, clip in zip(our_colors(clips, *factors), clips):
        difference = ours - torchvision_colors(clip.float(), *factors)
        assert difference[..., 6:-6, 6:-6].abs().max() < tolerance  # at the edges torchvision's blur mirrors


def test_hue_turns_as_torchvisions(demo):
    """On frames it is nearer than the hue turned the other way; HSV and the IQ plane differ."""
    clip = torch.cat([pretrain_clips(demo)[0, i]["target"][0] for i in range(10)])
    for hue in (-0.1, -0.05, 0.05, 0.1):
        theirs = torchvision_colors(clip.float(), 1, 1, 1, hue, 0.01)
        ours, turned = (our_colors(clip[None], 1, 1, 1, h, 0.01)[0] for h in (hue, -hue))
        assert (ours - theirs).abs().mean() < 0.6 * (turned - theirs).abs().mean()


def test_draws_of_colors(monkeypatch):
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with p .8, grey with p .2, blur of sigma .1 to 2 with p .5."""
    monkeypatch.setattr(cmaev, "color_parameters", lambda *factors: torch.stack(factors))
    with cmaev.seeded(4):
        brightness, contrast, saturation, hue, sigma = torch.stack([cmaev.draw_colors() for _ in range(4000)]).unbind(1)
    grey, jittered, blurred = saturation == 0, brightness != 1, sigma != 0.01
    shares = torch.stack([jittered, grey, blurred]).float().mean(dim=1)
    assert shares.tolist() == pytest.approx([0.8, 0.2, 0.5], abs=0.03)
    for drawn, low, high in ((brightness[jittered], 0.6, 1.4), (contrast[jittered], 0.6, 1.4), (sigma[blurred], 0.1, 2),
                             (saturation[jittered & ~grey], 0.6, 1.4), (hue[jittered], -0.1, 0.1)):
        expected = pytest.approx([low, (low + high) / 2, high], abs=0.03 * (high - low))
        assert [drawn.min(), drawn.mean(), drawn.max()] == expected


# 7  Video files and lists -----------------------------------------------------------------------------------

X264_OPEN = dict(x264_params="open-gop=1:keyint=12:bframes=3")
X265 = "log-level=none:keyint=12:bframes=4:open-gop="
FILES = {
    "h264.mp4": {}, "b-frames.mkv": dict(bf="3", g="12"), "open-gop.mkv": X264_OPEN,
    "h264.avi": dict(bf="2", g="12"), "one-frame.mp4": dict(frames=1),
    "variable-rate.mp4": dict(times=[i * 2 + (i * i) % 3 for i in range(60)], g="12"),
    "late-start.mkv": dict(times=range(30, 90), g="12"),
    "discarded-leading.mp4": dict(times=range(-10, 50), muxer=dict(avoid_negative_ts="disabled"), g="25"),
    "discarded-open-gop.mp4": dict(times=range(-20, 50), muxer=dict(avoid_negative_ts="disabled"), **X264_OPEN),
    "444.mp4": dict(pixels="yuv444p", size=(47, 63), g="12"),
    "hevc-open-gop.mp4": dict(codec="libx265", x265_params=X265 + "1"),
    "hevc-10-bit.mkv": dict(codec="libx265", pixels="yuv420p10le", x265_params=X265 + "0"),
    "vp9-hidden-frames.webm": dict(codec="libvpx-vp9", auto_alt_ref="1", lag_in_frames="16", cpu_used="8"),
    "av1.webm": dict(codec="libsvtav1", preset="12", svtav1_params="keyint=20"),
    "mpeg4.mov": dict(codec="mpeg4", bf="2", size=(35, 51)), "mpeg2.mxf": dict(codec="mpeg2video"),
    "mpeg2.vob": dict(codec="mpeg2video"), "ffv1.mkv": dict(codec="ffv1", size=(47, 63)),
    "raw.y4m": dict(codec="rawvideo"), "jpeg.mjpeg": dict(codec="mjpeg", pixels="yuvj420p"),
    "mjpeg.mp4": dict(codec="mjpeg", pixels="yuvj420p"), "prores.mkv": dict(codec="prores", pixels="yuv422p10le"),
    "picture.apng": dict(codec="apng", pixels="rgb24"), "picture.gif": dict(codec="gif", pixels="rgb8")}


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_plain_decode_and_of_ffmpeg(tmp_path, name):
    path = write_noise(tmp_path / name, **FILES[name])
    video = check_frames(path, 50 if "discarded" in name else FILES[name].get("frames", 60))
    by_seeking = name.endswith((".mp4", ".mkv", ".webm")) and name not in ("ffv1.mkv", "one-frame.mp4")
    assert (video.times is not None) == by_seeking
    if not shutil.which("ffmpeg"):
        pytest.skip("wants Debian's ffmpeg")
    frames = video.read(range(len(video))).numpy().astype(np.int16)
    to_rgb = "-v quiet -fps_mode passthrough -f rawvideo -pix_fmt rgb24 -".split()
    raw = subprocess.run(["ffmpeg", "-i", path, *to_rgb], capture_output=True).stdout
    truth = np.frombuffer(raw, np.uint8).reshape(-1, *frames.shape[1:])
    assert len(truth) == len(frames)
    for i, frame in enumerate(frames):  # versions of FFmpeg convert 10 bits and odd sizes to RGB differently
        distance = np.abs(truth - frame).mean(axis=(1, 2, 3))
        assert distance.argmin() == i and distance[i] < 12


@pytest.mark.parametrize("name, options", {
    "v.mkv": {}, "v.flv": {}, "v.h264": {}, "v.ts": {}, "v.webm": dict(codec="libvpx"),
    "fast.mp4": dict(muxer=dict(movflags="faststart")), "open-gop.ts": X264_OPEN,
    "parts.mp4": dict(muxer=dict(movflags="frag_keyframe+empty_moov")),
    "hevc.ts": dict(codec="libx265", x265_params=X265 + "1"),
    "mpeg2.ts": dict(codec="mpeg2video", bf="2"), "mpeg4.avi": dict(codec="mpeg4"),
    "refresh.ts": dict(x264_params="intra-refresh=1:keyint=12:bframes=0")}.items())
def test_files_cut_off_at_either_end(tmp_path, name, options):
    """The end is lost; or, of streams as they are recorded, the key frame that they begin with.

    H.264 that refreshes frames column by column has none: its cut begins at a recovery point, without a frame.
    """
    whole, counts = write_noise(tmp_path / name, **{"g": "12"} | options), []
    for share in (0.5, 0.8, 0.95):
        cut = tmp_path / f"{share}-{name}"
        cut.write_bytes(whole.read_bytes()[:int(share * whole.stat().st_size)])
        counts.append(len(check_frames(cut)))
    assert len(set(counts)) == 3 and counts[0] < 40
    for suffix in (whole.suffix, ".mkv", ".mp4") if whole.suffix in (".ts", ".avi") else ():
        for skip in {"refresh.ts": [12], "open-gop.ts": [7, 10]}.get(name, [7]):  # 10: a key frame, shown later
            late = copy_packets(tmp_path / f"late{suffix}", [whole], skip=skip)
            assert len(check_frames(late)) < 60 - skip or "mpeg4" in name


def test_altered_files(tmp_path, monkeypatch):
    """Tables that mislead, a title in another encoding, two sizes in one stream, too many frames to keep."""
    source, path = write_noise(tmp_path / "v.mp4", g="60", title="Caf\u00e9"), tmp_path / "altered.mp4"
    data = source.read_bytes()
    at = data.index(b"stss") + 15
    for altered in (data.replace(b"stss", b"free"),  # without a sync table all samples pass for key frames
                    data[:at] + b"\x09" + data[at + 1:],  # the first key frame is sample 9: no seek to the start
                    data.replace("Caf\u00e9".encode(), b"Caf\xe9\xe9")):
        assert altered != data
        path.write_bytes(altered)
        assert np.array_equal(check_frames(path, 60).read(range(60)), decode_all(source))
    parts = [write_noise(tmp_path / f"{size[0]}.h264", frames=20, size=size) for size in ((48, 64), (96, 80))]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert cmaev.Video(tmp_path / "both.h264").read(range(40)).shape == (40, 48, 64, 3)  # the first size
    monkeypatch.setattr(cmaev, "MAX_KEPT", 10 * 48 * 64)
    assert check_frames(write_noise(tmp_path / "v.avi", codec="mpeg4", bf="2"), 60).kept == []


def test_one_damaged_packet(tmp_path):
    """FFmpeg leaves one frame out. The index may promise it; samples are drawn from the true frames."""
    path = write_noise(tmp_path / "v.mp4", g="12")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
    data = bytearray(path.read_bytes())
    data[packet.pos + 4:packet.pos + packet.size] = bytes(packet.size - 4)
    path.write_bytes(data)
    video, frames = cmaev.Video(path), decode_all(path)
    with pytest.raises(cmaev.BadVideo, match="has 59 frames, not 60 as in its index"):
        video.read(range(24, 36))
    assert len(video) == 59 and np.array_equal(video.read(range(59)), frames)
    sample = finetune.TestViews([(path, 0)], 59, 1, 48, "dense")[0, 0]
    assert not sample["replaced"].any()
    assert np.array_equal(sample["clip"][0].movedim(1, -1), frames[:, :, 8:56])


@pytest.mark.parametrize("damaged", [24, 30, 31])  # a key frame, a P-frame shown after its B-frame, that B-frame
def test_concealed_frames(tmp_path, damaged):
    """FFmpeg fills a damaged frame's gaps from frames before it: those that seeking leaves out, too."""
    path = write_noise(tmp_path / "v.mp4", g="12", bf="3")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][damaged]
    data, third = bytearray(path.read_bytes()), packet.size // 3
    data[packet.pos + third:packet.pos + 2 * third] = np.random.default_rng(0).bytes(third)
    path.write_bytes(data)
    frames = decode_all(path)
    for i in range(24, 60):
        assert np.array_equal(cmaev.Video(path).read([i])[0], frames[i]), i


def test_color_matrices_that_swscale_refuses(tmp_path):
    """Read as FFmpeg 5 reads them: H.273's tag 2 is none, 9 and 10 are BT.2020's."""
    source = write_noise(tmp_path / "source.mp4", frames=3)
    bits = "h264_metadata=matrix_coefficients="
    tagged = {tag: copy_packets(tmp_path / f"{tag}.mp4", [source], bits=f"{bits}{tag}") for tag in (2, *range(8, 18))}
    for tag, path in tagged.items():
        like = tagged[9 if tag in (9, 10) else 2]
        assert np.array_equal(cmaev.Video(path).read(range(3)), decode_all(like)), tag


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_orientation_and_margins_that_the_stream_asks_for(tmp_path, suffix):
    """An H.264 message in the first packet turns all frames; a sequence's margins are cut to the pixel."""
    source = write_noise(tmp_path / "source.mp4", g="12")
    for bits, shown in {"display_orientation=insert:rotate=90": lambda x: np.rot90(x, 1, (1, 2)),
                        "display_orientation=insert:flip=horizontal": lambda x: x[:, :, ::-1],
                        "crop_left=6:crop_right=4:crop_top=2": lambda x: x[:, 2:, 6:60]}.items():
        path = copy_packets(tmp_path / f"changed{suffix}", [source], bits=f"h264_metadata={bits}")
        video, expected = cmaev.Video(path), shown(decode_all(source))
        for indices in ([50], range(60), [3]):
            assert np.array_equal(video.read(indices), expected[list(indices)]), bits


def test_margins_that_the_container_asks_for(tmp_path):
    """mp4's clap box (ISO 14496-12) by hand, 40 x 32 pixels, 4 right of and 2 above the middle; Matroska's."""
    source, path = write_noise(tmp_path / "v.mp4", g="12"), tmp_path / "clap.mp4"
    data, clap = bytearray(source.read_bytes()), struct.pack(">I4s8i", 40, b"clap", 40, 1, 32, 1, 4, 1, -2, 1)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        at = data.index(box, data.index(b"moov")) - 4
        size, = struct.unpack_from(">I", data, at)
        struct.pack_into(">I", data, at, size + len(clap))
    data[at + size:at + size] = clap
    path.write_bytes(data)
    expected = decode_all(source)[:, 6:38, 16:56]
    for cropped in (path, copy_packets(tmp_path / "crop.mkv", [path])):
        assert np.array_equal(cmaev.Video(cropped).read(range(60)), expected)


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1", "mpeg4"])
def test_display_matrix(tmp_path, codec):
    """Written into the track header by hand (ISO 14496-12: a b u c d v x y w)."""
    header = lambda a, b, c, d: struct.pack(">9i", *(int(v * 2**16) for v in (a, b, 0, c, d, 0, 0, 0, 2**14)))
    upright, path = write_noise(tmp_path / "upright.mp4", codec, frames=5), tmp_path / "turned.mp4"
    frames, (before, tkhd, after) = decode_all(upright), upright.read_bytes().partition(b"tkhd")

    def turned(*matrix):
        path.write_bytes(before + tkhd + after.replace(header(1, 0, 0, 1), header(*matrix), 1))
        return cmaev.Video(path)

    for matrix, expected in {
            (1, 0, 0, 1): frames, (-1, 0, 0, 1): frames[:, :, ::-1], (1, 0, 0, -1): frames[:, ::-1],
            (-1, 0, 0, -1): frames[:, ::-1, ::-1], (0, 1, -1, 0): np.rot90(frames, -1, (1, 2)),
            (0, -1, 1, 0): np.rot90(frames, 1, (1, 2)), (0, 1, 1, 0): frames.swapaxes(1, 2),
            (0, -1, -1, 0): frames[:, ::-1, ::-1].swapaxes(1, 2), (0, 0, 0, 0): frames}.items():
        assert np.array_equal(turned(*matrix).read(range(5)), expected), matrix
    with pytest.raises(cmaev.BadVideo, match="not by a multiple of 90 degrees"):
        turned(0.866, 0.5, -0.5, 0.866).read([0])  # by 30: FFmpeg would draw the picture anew


def test_the_best_of_several_video_streams(tmp_path):
    """A cover of one frame as the first stream; a smaller film before the larger one."""
    film = write_noise(tmp_path / "film.mkv")
    for name, options in {"cover.mkv": dict(codec="mjpeg", pixels="yuvj420p", frames=1, size=(200, 200)),
                          "small.mkv": dict(size=(32, 48))}.items():
        copy_packets(tmp_path / "both.mkv", [write_noise(tmp_path / name, **options), film])
        assert np.array_equal(cmaev.Video(tmp_path / "both.mkv").read(range(60)), decode_all(film))


@pytest.mark.parametrize("name, options", [
    ("v.mp4", dict(bf="0")), ("v.mp4", dict(bf="3")),
    ("hevc.mkv", dict(codec="libx265", x265_params="log-level=none:keyint=40:scenecut=0:bframes=3")),
    ("av1.webm", dict(codec="libsvtav1", preset="12", svtav1_params="keyint=40")),
    ("mjpeg.mkv", dict(codec="mjpeg", pixels="yuvj420p")), ("v.mov", dict(codec="prores", pixels="yuv422p10le"))])
def test_read_seeks_and_decodes_once(tmp_path, monkeypatch, name, options):
    x264, decoded = {} if "codec" in options else dict(g="40", x264_params="scenecut=0"), []
    video = cmaev.Video(write_noise(tmp_path / name, frames=240, **x264, **options))
    decode = video._decode

    def note(asked):
        for frame in decode(asked):
            decoded.append(video.times.index(frame.pts))
            yield frame

    monkeypatch.setattr(video, "_decode", note)
    video.read([210, 205, 215, 205])
    video.read([5, 125, 130])
    between = [*range(200, 216), *range(6), *range(120, 131)]  # from the key frame before
    if "pixels" in options:  # codecs of key frames alone
        assert decoded == [205, 210, 215, 5, 125, 130]
    elif name == "av1.webm" or options.get("bf") == "0":
        assert decoded == between
    else:  # without unwanted, unreferenced B-frames
        assert {205, 210, 215, 5, 125, 130} <= set(decoded) < set(between)
        assert len(decoded) < 0.8 * len(between)


def test_names_of_frames(tmp_path):
    """The video's frames in their order, or the error's words."""
    cases = {
        "img_9 img_10 flow_x_9 flow_y_9": "img_9 img_10", "1_rgb 2_rgb 1_depth": "1_rgb 2_rgb",
        "rgb_1 depth_1": "rgb_1", "cam0_1 cam0_2 cam1_1": "(cam0_1.jpg, cam1_1.jpg)",
        "img_1 img_flip_1": "(img_1.jpg, img_flip_1.jpg)", "cover 0001": "(0001.jpg, cover.jpg)",
        "frame1 rgb1 x1": "3 groups (frame1.jpg, rgb1.jpg, x1.jpg)", "b a": "(a.jpg, b.jpg)",
        "0.0 0.04 0.2 0.16 1": "0.0 0.04 0.16 0.2 1", "frame_12.5 frame_12.25": "frame_12.25 frame_12.5",
        "1.1 1.10": "the same frame", "1 01": "the same frame", "Image3 image2": "image2 Image3",
        "x x_(1) x_(2) x_(10)": "x x_(1) x_(2) x_(10)", "img_2 img_1_(1) img_1": "(img_1.jpg, img_1_(1).jpg)",
        "cam0_(1) cam1_(1)": "(cam0_(1).jpg, cam1_(1).jpg)", "s1_e2 s1_e10": "s1_e2 s1_e10",
        "1403636579763555584 1403636579763555585": "1403636579763555584 1403636579763555585",
        "2024-01-05-12 2024-01-06-11": "2024-01-05-12 2024-01-06-11"}
    for i, (names, expected) in enumerate(cases.items()):
        folder = touch(tmp_path / str(i), *(f"{name}.jpg" for name in names.split()))
        try:
            frames = " ".join(Path(frame).stem for frame in cmaev.frame_files(str(folder)))
        except cmaev.BadVideo as error:
            frames = expected if expected in str(error) else str(error)
        assert frames == expected


@pytest.mark.parametrize("by", ["torchvision", "av"])
def test_folders_of_frames(tmp_path, monkeypatch, by):
    """In natural order; PNG of 16 bits; a picture too small to be cropped; the orientations of Exif (TIFF).

    "av": without torchvision's function, as its later releases will be.
    """
    if by == "av":
        monkeypatch.delattr(torchvision.io, "decode_image")
        assert not hasattr(cmaev, "decode_image")
    touch(tmp_path, "notes.txt", "16/0.png", "dot/0.png", "turned/0.jpg")
    for i in range(12):
        frame = torch.full((3, 16, 24), i * 20, dtype=torch.uint8)
        (write_jpeg if i < 6 else write_png)(frame, str(tmp_path / f"img_{i}.{'jpg' if i < 6 else 'png'}"))
    video = cmaev.Video(tmp_path)
    assert len(video) == 12 and video.read([11, 2, 2]).float().mean(dim=(1, 2, 3)).tolist() == [220, 40, 40]
    deep = write_noise(tmp_path / "16" / "0.png", "png", frames=1, pixels="rgb48be")
    frame = cmaev.Video(deep.parent).read([0])
    assert frame.dtype == torch.uint8 and np.abs(frame.numpy() - decode_all(deep).astype(int)).max() <= 1
    write_png(torch.zeros(3, 1, 1, dtype=torch.uint8), str(tmp_path / "dot" / "0.png"))
    clips = cmaev.PretrainClips([(str(tmp_path / "dot"), 0), (str(tmp_path), 0)], (2, 4, 4), frames=4, rate=1)
    assert clips[0, 0]["replaced"].all() and not clips[0, 1]["replaced"].any()
    picture, file = np.zeros((16, 32, 3), np.uint8), tmp_path / "turned" / "0.jpg"
    picture[:8, :8], picture[8:, 24:] = 255, 128
    write_jpeg(torch.from_numpy(picture).permute(2, 0, 1), str(file), quality=100)
    data = file.read_bytes()
    for orientation, expected in enumerate((
            picture, picture[:, ::-1], picture[::-1, ::-1], picture[::-1], picture.swapaxes(0, 1),
            np.rot90(picture, -1), np.rot90(picture, 2).swapaxes(0, 1), np.rot90(picture)), 1):
        exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x112, 3, 1, orientation, 0)
        file.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
        frame = cmaev.Video(file.parent).read([0])[0].numpy().astype(int)
        assert frame.shape == expected.shape and np.abs(frame - expected).mean() < 3, orientation


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists(tmp_path, monkeypatch, encoding):
    """Paths with spaces, commas, digits at the end; labels; frame counts; one look into each folder."""
    path, asked = tmp_path / "list.csv", []
    touch(tmp_path, "b.mp4", "c,4.mp4", "clip 2/1.jpg", "clip/1.jpg", "d/1 2.mp4", "\u00e9 3.mp4", 'a "q" 1.mp4')
    read = {
        "clip 2": ("clip 2", None), "clip 2 7": ("clip 2", 7), "clip 30 1": ("clip", 1), "": None,
        "clip 2 12 6": ("clip 2", 6), "b.mp4\t5": ("b.mp4", 5), "b.mp4,-1": ("b.mp4", -1),
        "\u00e9 3.mp4": ("\u00e9 3.mp4", None), "d/1 2.mp4,4": ("d/1 2.mp4", 4),
        "c,4.mp4": ("c,4.mp4", None), f"{tmp_path}/c,4.mp4 5": ("c,4.mp4", 5),
        '"clip 2" 3': ("clip 2", 3), '"c,4.mp4",2': ("c,4.mp4", 2), '"b.mp4","1"': ("b.mp4", 1),
        '"clip 2" 30 4': ("clip 2", 4), '"clip 2"': ("clip 2", None),
        '"a ""q"" 1.mp4" 8': ('a "q" 1.mp4', 8), 'a "q" 1.mp4 9': ('a "q" 1.mp4', 9)}
    path.write_bytes("".join(f"{line}\r\n" for line in read).encode(encoding))
    expected = [(str(tmp_path / video[0]), video[1]) for video in read.values() if video]
    with monkeypatch.context() as patch:
        for module, name in ((os, "listdir"), (os.path, "exists")):
            spy = lambda path, ask=getattr(module, name): asked.append(path) or ask(path)
            patch.setattr(module, name, spy)
        assert cmaev.read_list(path) == expected
    assert len(asked) == 4  # the list; its folder, by a relative and by an absolute path; d
    huge = f"b.mp4 {10**100}"
    for line, missing in {"path,label": "path,label", '"b.mp4",3.0': "b.mp4,3.0", '"c,5.mp4" 3': "c,5.mp4",
                          "lost 12 3": "lost", huge: huge}.items():
        path.write_bytes(f"{line}\r\nb.mp4,1".encode(encoding))
        with pytest.raises(cmaev.CMAEVError, match=f"line 1: {tmp_path}/{missing} does not exist .*take it out"):
            cmaev.read_list(path)
    path.write_text("b.mp4,1", "utf-16")
    with pytest.raises(cmaev.CMAEVError, match="is not a text file: give a list in UTF-8"):
        cmaev.read_list(path)


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path / "d", b"a/caf\xe9.mp4", "b/x.mp4")
    (tmp_path / "list.txt").write_bytes(b"d/a/caf\xe9.mp4 0\n")
    (path, label), = cmaev.read_list(tmp_path / "list.txt")
    assert os.fsencode(path).endswith(b"caf\xe9.mp4") and label == 0
    assert cmaev.read_list(tmp_path / "d")[0] == (path, 0)
    write_noise(tmp_path / "v.mp4", frames=5).rename(path)
    assert len(cmaev.Video(path)) == 5
    finetune.report(torch.tensor([[0.7, 0.3]]), [(path, 0)], ["a", "b"], tmp_path)
    assert b"caf\xe9.mp4,a,a,0.7000" in (tmp_path / "predictions.csv").read_bytes()


def test_folders_as_people_have_them(tmp_path, capsys):
    """Hidden entries are no classes and no videos; sub-folders count; the root's own videos have no label."""
    touch(tmp_path, *"""a/1.mp4 a/part/2.GIF a/._1.mp4 a/.thumbs/1.jpg a/take/1.png a/take/Thumbs.db b/1.mts
        b/2.M2TS b/3.vob b/4.mxf b/notes.txt c/poster.jpg c/1.mp4 empty/readme.md @eaDir/x.mp4 __MACOSX/a/1.mp4
        .ipynb_checkpoints/1.mp4 .x/1.mp4 flat.webm""".split())
    expected = {"a/1.mp4": 0, "a/part/2.GIF": 0, "a/take": 0, "b/1.mts": 1, "b/2.M2TS": 1, "b/3.vob": 1,
                "b/4.mxf": 1, "c/1.mp4": 2, "flat.webm": None}
    assert cmaev.read_list(tmp_path) == [(str(tmp_path / name), label) for name, label in expected.items()]
    assert "3 files are not videos and are left out, for example" in capsys.readouterr().out
    with pytest.raises(cmaev.CMAEVError, match="flat.webm has no label"):
        finetune.read_labelled(tmp_path)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic links"):
        cmaev.read_list(tmp_path)


# 8  Weights -------------------------------------------------------------------------------------------------

def without_k_bias(*models):
    """VideoMAE's files have none: it is zero."""
    for block in (block for model in models for block in model.blocks):
        block.attn.qkv.bias.data.view(3, -1)[1] = 0


def videomae_names(state, prefix):
    """This project's ViT as VideoMAE's files hold it."""
    return {prefix + name: value for name, value in cmaev.split_biases(state).items()}


def hugging_face_names(state, q_bias="q_bias", v_bias="v_bias", prefix="videomae."):
    """The same as Hugging Face's VideoMAE holds it; the names of the biases differ by release."""
    inner, out = "attention.attention", {}
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "norm.": "layernorm.",
        "attn.q_bias": f"{inner}.{q_bias}", "attn.v_bias": f"{inner}.{v_bias}",
        "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for name, value in videomae_names(state, prefix).items():
        for our, theirs in names.items():
            name = name.replace(our, theirs)
        if "attn.qkv.weight" in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                out[name.replace("attn.qkv", f"{inner}.{part}")] = piece
        else:
            out[name] = value
    return out


LAYOUTS = {
    "VideoMAE, pre-trained": lambda state: {
        "model": videomae_names(state, "encoder.") | {"decoder.norm.bias": torch.ones(3)}},
    "VideoMAE, fine-tuned": lambda state: {"module": {"fc_norm.weight": torch.ones(24)} | videomae_names(
        {name: value for name, value in state.items() if not name.startswith("norm")}, "")},
    "transformers 4": hugging_face_names,
    "transformers 5.8": lambda state: hugging_face_names(state, "query.bias", "value.bias"),
    "for all releases": lambda state: (
        hugging_face_names(state) | hugging_face_names(state, "query.bias", "value.bias")),
    "transformers, bare model": lambda state: hugging_face_names(state, prefix=""),
    "training script's": lambda state: {
        "model": videomae_names(state, "encoder."), "epoch": 799, "best": np.float64(1),
        "history": np.arange(3), "args": argparse.Namespace(lr=1e-3, output_dir=Path("runs"))},
    "state_dict": lambda state: {"state_dict": {f"backbone.{n}": v for n, v in state.items()}},
    "model_state": lambda state: {"model_state": state, "optimizer_state": {}},
    "teacher": lambda state: {"student": {}, "teacher": {f"module.backbone.{n}": v for n, v in state.items()}},
    "ours": lambda state: {"step": 3, "model": {
        **{f"encoder.{n}": v for n, v in state.items()}, **{f"target_encoder.{n}": 2 * v for n, v in state.items()}}}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_weights_load_into_the_right_places(tmp_path, layout, capsys):
    """Into an encoder for another grid, which has its own positions."""
    encoder, path = small_encoder("vit"), tmp_path / "weights.bin"
    without_k_bias(encoder)
    state = encoder.state_dict()
    torch.save(LAYOUTS[layout](state), path)
    loaded = cmaev.load_encoder(path, cmaev.VisionTransformer(24, 2, 2, **SMALL | dict(frames=8, size=64)))
    same = [name for name, value in loaded.state_dict().items() if torch.equal(state[name], value)]
    assert same == [name for name in state if not ("fine-tuned" in layout and name.startswith("norm."))]
    assert torch.equal(loaded.positions, cmaev.sincos_table(64, 24))
    assert "holds a VisionTransformer, width 24, depth 2, heads 1, frames 16" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_of_hugging_faces(tmp_path, suffix):
    encoder, stem = small_encoder("vit"), {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    without_k_bias(encoder)
    write_file = torch.save if suffix == "bin" else pytest.importorskip("safetensors.torch").save_file
    foreign = {name: value.clone() for name, value in hugging_face_names(encoder.state_dict()).items()}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text("{}")
    shards = [tmp_path / f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for i, shard in enumerate(shards):
        write_file({name: foreign[name] for name in list(foreign)[i::2]}, shard)
    loaded = cmaev.load_encoder(tmp_path, small_encoder("vit", heads=1)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
    shards[1].unlink()
    with pytest.raises(cmaev.CMAEVError, match="is missing in the file"):
        cmaev.load_encoder(tmp_path, small_encoder("vit"))


def test_decoder_of_a_videomae_file_gives_its_loss(tmp_path, capsys):
    """A decoder of another depth starts anew, and a note says so."""
    path, (model, (online, _, mask)) = tmp_path / "videomae.pth", tiny_model(contrast_weight=0.0)
    without_k_bias(model.encoder, model.decoder)
    decoder = videomae_names(model.decoder.state_dict(), "decoder.")
    decoder["mask_token"] = decoder.pop("decoder.mask_token").view(1, 1, -1)
    decoder["encoder_to_decoder.weight"] = decoder.pop("decoder.embed.weight")
    torch.save({"model": videomae_names(model.encoder.state_dict(), "encoder.") | decoder}, path)
    torch.manual_seed(1)
    other = cmaev.CMAEV("vit_test", contrast_weight=0.0, **TINY)
    cmaev.load_encoder(path, other.encoder, other.decoder)
    assert other(online, None, mask)["loss"] == model(online, None, mask)["loss"]
    assert "note" not in capsys.readouterr().out
    encoder = cmaev.build_encoder("vit_test", **TINY)
    decoder = cmaev.PixelDecoder(encoder, depth=12)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    cmaev.load_encoder(path, encoder, decoder)
    assert capsys.readouterr().out.count("note: the decoder starts anew: ") == 1
    assert torch.equal(encoder(online), model.encoder(online))
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "convvit"])
def test_an_encoder_is_built_from_its_file(tmp_path, name):
    """Ours from the stored geometry; foreign ones from the shapes and the settings beside them."""
    encoder, clip, path = small_encoder(name), torch.randn(1, 3, 4, 32, 48), tmp_path / "x.pth"
    cmaev.save_encoder(encoder, tmp_path / "encoder.pt")
    for saved in (tmp_path, tmp_path / "encoder.pt"):
        torch.testing.assert_close(cmaev.load_encoder(saved)(clip), encoder(clip))
    large = cmaev.build_encoder(f"{name}_tiny", frames=4, size=32, patch=8)
    torch.save({"model": {f"encoder.{key}": value for key, value in large.state_dict().items()}}, path)
    for file, text, geometry in (
            ("none", "", (8, 28, 28)),
            ("config.json", '{"num_frames": 4, "image_size": 64}', (2, 8, 8)),
            ("config.json", '{"num_frames": 4, "image_size": [64, 32]}', (2, 8, 4)),
            ("settings.json", '{"settings": {"frames": 2, "size": 32}}', (1, 4, 4))):
        (tmp_path / file).write_text(text)
        built = cmaev.load_encoder(path)
        assert built.grid == geometry and built.cube == (2, 8, 8) and built.layers()[-1].attn.heads == 3
        shapes, expected = ({n: x.shape for n, x in model.state_dict().items()} for model in (built, large))
        assert shapes == expected


@pytest.mark.parametrize("file, content, words", [
    ("config.json", '{"num_attention_heads": 4}', "other attention heads: it holds a VisionTransformer"),
    ("config.json", '{"hidden_act": "relu"}', "config.json: hidden_act is relu, only gelu is supported"),
    ("config.json", "[1", "config.json is damaged"),
    ("settings.json", '{"settings": {"encoder": "four_heads"}}', "with other attention heads"),
    ("geometry", dict(grid=[2, 2, 3], cube=[2, 16, 16], heads=4), "with other attention heads"),
    ("pos_embed", torch.ones(1, 12, 24), "pos_embed is [1, 12, 24] in the file, missing here"),
    ("blocks.2.norm1.bias", torch.ones(24), "blocks.2.norm1.bias is [24] in the file, missing here"),
    ("blocks.0.mlp.fc1.weight", None, "blocks.0.mlp.fc1.weight is missing in the file, [96, 24] here")])
def test_weights_that_would_give_other_features_are_refused(tmp_path, monkeypatch, file, content, words):
    """Shapes do not tell. Without an encoder, the one that is built has the file's heads."""
    sizes = dict(width=24, depth=2, heads=4)
    monkeypatch.setitem(cmaev.ENCODERS, "four_heads", (cmaev.VisionTransformer, sizes))
    encoder, clip, path = small_encoder("vit"), torch.randn(1, 3, 4, 32, 48), tmp_path / "x.pth"
    stored = {"model": encoder.state_dict()}
    if file.endswith("json"):
        (tmp_path / file).write_text(content)
    else:
        (stored if file == "geometry" else stored["model"])[file] = content
    torch.save(stored, path)
    with pytest.raises(cmaev.CMAEVError, match=re.escape(words)):
        cmaev.load_encoder(path, small_encoder("vit"))
    if "heads" in words:
        four = small_encoder("vit", heads=4)
        four.load_state_dict(encoder.state_dict())
        built = cmaev.load_encoder(path, small_encoder("vit", heads=4))
        assert torch.equal(built(clip), four(clip))
        assert not torch.allclose(four(clip), encoder(clip), atol=1e-3)
        assert cmaev.load_encoder(path).blocks[0].attn.heads == 4
    else:
        with pytest.raises(cmaev.CMAEVError, match="config.json|missing"):
            cmaev.load_encoder(path)


@both_encoders
def test_what_is_said_of_an_encoder_of_another_size(tmp_path, capsys, encoder):
    """The sizes in the file, where they do not fit; another position table fits."""
    own = dict(fusion=False, **TINY)
    cmaev.save_encoder(cmaev.build_encoder(encoder, **own), tmp_path / "encoder.pt")
    sizes = dict(vit_test="VisionTransformer, width 64, depth 2",
                 convvit_test="ConvViT, widths (16, 32, 64), depths (1, 1, 1), fusion False")[encoder]
    words = re.escape(f"holds a {sizes}, heads 2, frames 4, size [32, 32], tubelet 2, patch 8")
    for name, changes in {"vit_tiny": {}, "convvit_tiny": {}, encoder: dict(patch=16)}.items():
        with pytest.raises(cmaev.CMAEVError, match=f"is of another model.* it {words}$"):
            cmaev.load_encoder(tmp_path, cmaev.build_encoder(name, **own | changes))
    for changes in ({}, dict(frames=8), dict(size=64)):
        cmaev.load_encoder(tmp_path, cmaev.build_encoder(encoder, **own | changes))
        assert re.search(words, capsys.readouterr().out)


# 9  Training: settings, ranks, signals, wrong input ---------------------------------------------------------

USUAL = "--recipe demo --encoder vit_test --batch-size 4 --data good.txt"
WRONG = [
    (pretrain, USUAL, {
        "--data nowhere.txt": "nowhere.txt: no such list", "--data empty.txt": "empty.txt: no videos in it",
        "--data nothing": "nothing: no videos in it", "--data good.mp4": "good.mp4: is not a text file",
        "--data audio.txt --repeats 4": "audio.mp4: has no video stream",
        "--data text.txt --repeats 4": "text.mp4: cannot be opened as a video",
        "--data late.txt --workers 1 --out late": "10 videos in a row cannot be read, the last one: audio.",
        "--size 50": "50x50 pixels does not divide", "--frames 3": "3 frames of 56x56",
        "--encoder vgg": "no encoder 'vgg'", "--encoder convvit_tiny --size 60 --patch 6": "patch size 6",
        "--batch-size 16": "error: --batch-size 16: give no more than",
        "--micro-batch 3": "--batch-size 4: give a multiple of 1 ranks x --micro-batch 3 (0: all)",
        "--micro-batch 1 --repeats 2": "x --micro-batch 1 (0: all), which must be a multiple of 2 repeats",
        "--out good.txt/run": "Not a directory: 'good.txt/run'", "--epoch 3": "--epoch",
        "--amp fp8": "--amp: invalid choice: 'fp8'", "--epochs x": "--epochs: invalid",
        "--epochs 0": "--epochs: 0: give a number in [1, inf)",
        f"--seed {2**64}": f"--seed: {2**64}: give a number in [0, {2**64})",
        "--lr 0": "--lr: 0: give a number in (0, inf)", "--lr inf": "give a number in (0, inf)",
        "--clip-grad nan": "--clip-grad: nan: give a number in [0, inf)", "--momentum 1.1": "in [0, 1]",
        "--epochs 2": "error: the recipe's --warmup-epochs 2: give less than --epochs 2",
        "--warmup-epochs 45": "error: --warmup-epochs 45: give less than the recipe's --epochs 45"}),
    (pretrain, "", {
        "--data good.txt": "--data without --recipe: give ", "--val good.txt": "--val without --data",
        "--recipe demo --data good.txt": "error: the recipe's --batch-size 16: give no more than the 8 clips",
        "--recipe small --repeats 3": "x the recipe's --micro-batch 64 (0: all), which must be a multiple",
        "--recipe k400": "needs --data"}),
    (finetune, f"{USUAL} --val good.txt --init none", {
        "--val large.txt": "large.txt: good.mp4 is of class 7: training has 0 to 0",
        "--val huge.txt": f"good.mp4 is of class {10**20}: training has 0",
        "--val text.txt --probe knn --workers 1": "text.mp4: cannot be opened",
        "--data none.txt": "good.mp4 has no label: give 0, 1, 2",
        "--data one.txt --probe linear": "two or more training videos",
        "--names lost.txt": "No such file or directory: 'lost.txt'",
        "--init lost.pt": "error: --init lost.pt: no such run",
        **{f"--init {file}": f"{file} cannot be read as weights" for file in (
            "text.mp4", "good.mp4", "good.txt", "empty.txt", "array.npz", "tensor.pt")},
        "--init no-tensors.pt": "no-tensors.pt holds no encoder ('patch_embed.proj.weight'): give a",
        "--init other.pt": "other.pt holds no encoder ('patch_embed.proj.weight'): give a",
        "--predict": "--predict: expected at least one argument",
        "--predict good.mp4 --out nothing": "nothing holds no checkpoint.pt",
        "--batch-size 1 --mixup 1": "two or more videos per",
        "--micro-batch 3": "1 ranks x --micro-batch 3 (0: all)", "--layer-decay 0": "a number in (0, 1]"}),
    (finetune, "", {
        "--data good.txt": "--data without --recipe: give ", "--val good.txt": "--val without --data",
        "--recipe demo --data good.txt --init none": "the recipe's --batch-size 16: give no more than the 7",
        "--recipe k400 --init none": "--data is not given"})]


@pytest.mark.parametrize("script, usual, arguments, words", [
    (script, usual, *row) for script, usual, rows in WRONG for row in rows.items()])
def test_wrong_input_ends_in_one_line(wrong, monkeypatch, script, usual, arguments, words):
    monkeypatch.chdir(wrong)
    end = run(script, *usual.split(), *arguments.split())
    assert end.startswith("error: ") and words in end and "\n" not in end and not Path("runs").exists()


def test_notes_on_few_steps_and_a_low_learning_rate(monkeypatch, capsys):
    low = "is 10.0% of the recipe's: for that give --lr 1.5e-03\n"
    for arguments, steps, end in (("--batch-size 205", 500, ""), ("--batch-size 204", 500, low),
                                  ("", 499, "note: 499 steps are few: for 500 give --epochs 802\n")):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--recipe", "k400", *arguments.split()])
        cmaev.note_weak_settings(pretrain.read_settings(), steps)
        output = capsys.readouterr().out
        assert output.endswith(end) and output.count("\n") == bool(end)


def test_what_a_run_was_started_with_has_to_stay(demo, tmp_path, monkeypatch):
    """Settings, videos and model; before its first checkpoint all may change."""
    videos, settings = cmaev.read_list(demo / "train.txt")[:8], tmp_path / "settings.json"
    listed, checkpoint = write_list(tmp_path / "list.txt", videos), tmp_path / "checkpoint.pt"
    command = pretraining(demo, tmp_path, "--data", listed, "--encoder", "vit_test", "--epochs", 2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(cmaev, "optimizer_step", mock.Mock(side_effect=MemoryError))
        run(pretrain, *command)
    assert settings.exists() and not checkpoint.exists()
    command += ["--batch-size", 4]
    assert run(pretrain, *command) is None and run(pretrain, *command, "--bad-share", 0.1) is None
    end = run(pretrain, *command, "--epochs", 3, "--encoder", "vit_tiny", "--workers", 1)
    assert "(encoder vit_test -> vit_tiny; epochs 2 -> 3)" in end and "number of epochs needs a new run" in end
    for text in ("", '{"settings": {"da', "[1]", "{}"):
        settings.write_text(text)
        assert "settings.json is damaged" in run(pretrain, *command)
        assert "settings.json is damaged" in run(finetune, "--out", tmp_path, "--eval")
    settings.unlink()
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["encoder.norm.weight"] = torch.ones(7)
    torch.save(state, checkpoint)
    assert "of another model: encoder.norm.weight is [7] in the file, [64] here" in run(pretrain, *command)
    checkpoint.write_bytes(b"no checkpoint")
    assert "checkpoint.pt cannot be read" in run(pretrain, *command)
    write_list(listed, videos[:-1])
    assert "has changed since" in run(pretrain, *command)


@pytest.mark.parametrize("environment, gpus, expected", [
    ("LOCAL_RANK=3", 4, "cuda:3"), ("LOCAL_RANK=3", 1, "cuda:0"), ("RANK= WORLD_SIZE=", 0, "cpu"),
    ("LOCAL_RANK=2", 2, "more ranks on this node than its 2 GPUs"),
    ("LOCAL_RANK=0 LOCAL_WORLD_SIZE=2", 1, "more ranks on this node than its 1 GPUs"),
    ("WORLD_SIZE=2", 0, "RANK expected, but not set"), ("RANK=1", 0, "WORLD_SIZE expected, but not set"),
    ("RANK=1 WORLD_SIZE=2", 0, "MASTER_ADDR expected"), ("RANK=0 WORLD_SIZE=two", 0, "'two'")])
def test_a_rank_finds_its_device_and_the_others(monkeypatch, environment, gpus, expected):
    """As torchrun starts it, or SLURM, whose --gpus-per-task=1 shows each task one GPU. GPUs are pretended."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for assignment in environment.split():
        monkeypatch.setenv(*assignment.split("="))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    try:
        assert str(cmaev.join_ranks()) == expected
    except ValueError as error:
        assert expected in str(error)


@pytest.mark.parametrize("script", [pretrain, finetune])
def test_ranks_that_differ_do_not_train(demo, tmp_path, two_ranks, monkeypatch, script):
    """In lists, settings or checkpoint."""
    for rank in range(2):
        for name, error in zip(DIFFERENCES, torch.load(two_ranks / f"errors-{rank}.pt"), strict=True):
            assert error == 4 if name == "" else error.startswith(f"the ranks differ in {name}")
    command = (pretraining if script is pretrain else finetuning)(demo, tmp_path, "--val", demo / "val.txt")
    command += ["--init", "none"]
    monkeypatch.setattr(cmaev, "world_size", lambda: 2)
    monkeypatch.setattr(cmaev, "objects_of_ranks", lambda x: [x, x and x | dict(lists="")])
    assert "the ranks differ in lists" in run(script, *command)


def run_stopped(lines, script, *command):
    """A run that receives SIGTERM when its log has `lines` lines: it saves, logs one more, and stops."""
    log = Path(command[command.index("--out") + 1]) / "log.jsonl"
    received = lambda: signal.SIGTERM * (len(log.read_text().splitlines()) == lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmaev, "notice_signals", lambda: received)
        assert run(script, *command) == str(cmaev.SAVED_AND_STOPPED)


def test_a_signal_saves_before_the_held_out_loss(demo, undisturbed, tmp_path, monkeypatch, capsys):
    """That is the mean of the videos' losses. It changes nothing, and neither does the stop."""
    command = pretraining(demo, tmp_path, "--val", demo / "val.txt", "--save-every", 8)
    measure, saved = pretrain.held_out_reconstruction, []

    def measure_twice(model, clips, s, device):
        """In batches of 8 and 2, and each video alone."""
        saved.append(checkpoint_of(tmp_path)["step"])
        measured = measure(model, clips, s, device)
        samples = [clips[0, i] for i in range(10)]
        losses = [model(cmaev.normalize(x["online"]), None, x["mask"])["loss"].item() for x in samples]
        assert measured == pytest.approx(np.mean(losses), rel=1e-5)
        return measured
    monkeypatch.setattr(pretrain, "held_out_reconstruction", measure_twice)
    run_stopped(2, pretrain, *command)
    assert saved == [8]
    assert run(pretrain, *command) is None and saved == [8, 8, 16]
    log, output = log_of(tmp_path), capsys.readouterr().out
    held_out = {line["step"]: line.pop("held_out_reconstruction", None) for line in log}
    assert log == log_of(undisturbed) and [step for step in held_out if held_out[step]] == [8, 16, 20]
    assert f"held-out reconstruction {held_out[20]:.4f}" in output and "is finished" not in output
    assert_same_weights(tmp_path, undisturbed)


def test_a_signal_saves_before_a_test(demo, tuned, undisturbed, tmp_path, monkeypatch, capsys):
    """A fine-tuning stopped in training and in its last test, which is repeated, gives the same report."""
    command = finetuning(demo, tmp_path, "--init", undisturbed, "--save-every", 99)
    report, saved = finetune.report, []

    def stopped_at_the_last(*arguments):
        saved.append(checkpoint_of(tmp_path)["step"])
        if arguments[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "report", stopped_at_the_last)
        run_stopped(2, finetune, *command)
        assert saved == [4] and run(finetune, *command) == str(cmaev.SAVED_AND_STOPPED)
    assert saved == [4, 4, 4, 9] and not (tmp_path / "predictions.csv").exists()
    assert run(finetune, *command) is None and log_of(tmp_path) == log_of(tuned)
    assert (tmp_path / "predictions.csv").read_text() == (tuned / "predictions.csv").read_text()
    output = capsys.readouterr().out
    assert "no --val: 10 of the 40 videos" in output and "is finished" not in output
    assert run(finetune, *command) is None and "is finished" in capsys.readouterr().out


def test_without_what_windows_lacks(demo, tmp_path, monkeypatch):
    """The module, and a run without decoding processes."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("SIGKILL", "SIGCHLD"):
        monkeypatch.delattr(signal, name)
    runpy.run_path(cmaev.__file__)
    more = "--encoder vit_test --subset 8 --epochs 1 --warmup-epochs 0"
    assert run(pretrain, *pretraining(demo, tmp_path, *more.split())) is None


def test_decay_groups_and_schedule():
    model, _ = tiny_model()
    decayed, free = ({id(p) for p in group["params"]} for group in cmaev.decay_groups(model, 0.05))
    for name, p in model.named_parameters():
        one_number_per_channel = name.endswith(("bias", "mask_token", "or.1.weight")) or "norm" in name
        where = "neither" if name.startswith("target") else "free" if one_number_per_channel else "decayed"
        assert (id(p) in decayed, id(p) in free) == (where == "decayed", where == "free"), name
    rates = [cmaev.learning_rate(step, 10, 50, 0.1, 1.0, 0.2) for step in range(50)]
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.0, 10).tolist())
    assert rates[10:] == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)])


def test_feed_puts_clips_of_one_video_apart_and_counts_the_waiting():
    """Because mixup and cutmix mix neighbours."""
    def late_batches():
        for _ in range(2):
            time.sleep(0.2)
            yield {"clip": torch.arange(3).view(3, 1, 1).expand(-1, 2, 5), "mask": torch.ones(3, 2, 4)}
    feed = cmaev.Feed(late_batches(), torch.device("cpu"))
    batch, _ = next(feed), next(feed)
    assert batch["clip"][:, 0].tolist() == [0, 1, 2, 0, 1, 2] and batch["mask"].shape == (6, 4)
    assert feed.waited() == pytest.approx(0.4, abs=0.1) and feed.waited() == 0
    with pytest.raises(StopIteration):
        next(feed)


@both_encoders
def test_two_ranks_give_the_gradient_of_the_whole_batch(two_ranks, encoder):
    """And a bad loss on one of them stops the step on both."""
    model, batch = tiny_model(encoder, batch=8)
    losses = model(*batch)
    losses["loss"].backward()
    for rank in range(2):
        means, grads = torch.load(two_ranks / f"{encoder}-{rank}.pt", weights_only=True)
        assert means == pytest.approx({name: losses[name].item() for name in pretrain.METRICS}, rel=1e-5)
        assert_close_gradients(grads, gradients(model))
    (one, weights), (other, same) = (zip(*torch.load(two_ranks / f"steps-{rank}.pt")) for rank in (0, 1))
    assert one == other == (True, False, True) and all(map(torch.equal, weights, same))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("script, more", [
    (pretrain, "--epochs 2 --repeats 2"),
    (finetune, "--init none --mixup 0 --cutmix 0 --drop-path 0 --val-every 0 --segments 1 --crops 1")])
def test_a_run_in_micro_batches_logs_the_same(demo, tmp_path, script, more):
    """To float64's rounding, also if it is stopped and continued. Mixup and drop path draw per micro-batch."""
    arguments = pretraining if script is pretrain else finetuning
    whole, parts = (arguments(demo, tmp_path / name, "--encoder", "vit_test", "--subset", 16, *more.split())
                    for name in ("whole", "parts"))
    parts += ["--micro-batch", "2"]
    with float64():
        assert run(script, *whole) is None
        run_stopped(1, script, *parts)
        assert run(script, *parts) is None
    logs = log_of(tmp_path / "parts"), log_of(tmp_path / "whole")
    for line, expected in zip(*logs, strict=True):
        assert line == pytest.approx(expected, rel=1e-6)


@slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_start_methods_of_decoding_processes(demo, tmp_path, monkeypatch, method):
    usual = multiprocessing.context._default_context
    monkeypatch.setattr(usual, "_actual_context", multiprocessing.get_context(method))
    more = "--workers 1 --encoder vit_test --subset 8 --epochs 1 --warmup-epochs 0"
    assert run(pretrain, *pretraining(demo, tmp_path, *more.split())) is None
    assert multiprocessing.get_start_method() == method


@slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="wants root")
def test_small_shared_memory_is_one_line(demo, tmp_path):
    command = pretraining(demo, tmp_path / "run", "--workers", 1, "--size", 96)
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "bash", "-c", mount, "_", sys.executable, HERE / "pretrain.py", *command]
    error = subprocess.run(command, capture_output=True, text=True).stderr
    if "unshare" in error or "mount" in error:
        pytest.skip("no mounts here")
    assert error.splitlines()[-1].startswith("error: the shared memory, /dev/shm, is too small"), error
    assert "Traceback" not in error


@pytest.mark.parametrize("script", ["cmaev", "pretrain", "finetune"])
def test_openmp_threads_wait_passively(monkeypatch, script):
    """Set before torch loads its OpenMP, unless the user has set it. Here the import of torch fails."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "cmaev")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for given in ("passive", "active"):
        with pytest.raises(ImportError, match="torch"):
            runpy.run_path(f"{HERE / script}.py")
        assert os.environ["OMP_WAIT_POLICY"] == given
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")


def test_recipe_small_has_the_papers_token_grid(demo, tmp_path, monkeypatch, capsys):
    """A geometry that shows fewer than ten tubes gets a warning. The runs end before their first step."""
    clips, usual = [], "--encoder vit_test --batch-size 4 --micro-batch 2 --epochs 1 --warmup-epochs 0"

    def loader(dataset, *_, **order):
        clips.append(dataset)
        raise cmaev.CMAEVError("enough")
    monkeypatch.setattr(cmaev, "loader", loader)
    for recipe, warning in ("small", None), ("demo --mask-ratio 0.9", "only 5 of 49 tubes are visible (in the"):
        command = f"--recipe {recipe} {usual} --data {demo}/train.txt --out {tmp_path}/{recipe[:4]}"
        assert run(pretrain, *command.split()) == "error: enough"
        output = capsys.readouterr().out
        assert f"warning: {warning}" in output if warning else "warning" not in output
    assert clips[0].grid == (8, 14, 14) and (~clips[0][0, 0]["mask"]).sum() == 8 * 20


def test_pretraining_goes_on_from_weights(demo, undisturbed, tmp_path, monkeypatch):
    """From a run, encoder and decoder; from an encoder alone; the target starts as a copy."""
    for path, decoder in ((undisturbed, True), (undisturbed / "encoder.pt", False)):
        command = pretraining(demo, tmp_path, "--init", path)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *command])
        model = pretrain.build(pretrain.read_settings(), torch.device("cpu"))[0]
        state, trained = model.state_dict(), checkpoint_of(undisturbed)["model"]
        for name, value in state.items():
            if name.startswith(("encoder.", "decoder.")) and not name.endswith("qkv.bias"):
                assert torch.equal(value, trained[name]) == (decoder or name.startswith("encoder.")), name
            if name.startswith("target_"):
                assert torch.equal(value, state[name.removeprefix("target_")])
    run_stopped(0, pretrain, *command)  # its first step is that of the model that was built
    clips = pretrain_clips(demo, seed=0, rate=4)
    first = next(cmaev.batches(len(clips), 8, 1, 0))
    batch = torch.utils.data.default_collate([clips[key] for key in first])
    loss = model(cmaev.normalize(batch["online"][:, 0]), None, batch["mask"][:, 0])["reconstruction"].item()
    assert cmaev.read_log(tmp_path)[0]["reconstruction"] == pytest.approx(loss, rel=1e-5)


def test_effective_rank():
    """Against numpy's singular values; shifted, scaled and rotated; equal directions; collapsed; NaN."""
    rng = np.random.default_rng(0)
    for count, width in ((300, 24), (10, 24), (2, 24)):
        x = rng.normal(size=(count, width)) * np.logspace(0, -4, width) + 3
        share = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
        share = share[share > 1e-20 * share.max()] / share.sum()
        expected = pytest.approx(np.prod(share ** -share), rel=1e-9)
        rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
        for same in (x, 7 - 5 * x, x @ rotation, np.concatenate([x, x]), np.insert(x, 1, [np.nan, *x[0, 1:]], axis=0)):
            assert pretrain.effective_rank(torch.from_numpy(same)) == expected
    pairs = torch.cat([torch.eye(24)[:5], -torch.eye(24)[:5]])
    assert pretrain.effective_rank(pairs) == pytest.approx(5)
    feature = torch.randn(24)
    for alike in (torch.zeros(9, 24), feature.expand(9, 24), feature * (1 + 2**-12 * torch.randn(99, 24))):
        assert pretrain.effective_rank(alike) == 1
    assert pretrain.effective_rank(feature * (1 + 2**-6 * torch.randn(999, 24))) > 5
    assert math.isnan(pretrain.effective_rank(torch.full((9, 24), math.nan)))


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_log_line_has_the_rank_of_the_clips_since_the_last_one(demo, tmp_path, monkeypatch, micro_batch):
    monkeypatch.setattr(pretrain, "effective_rank", len)
    more = "--encoder vit_test --subset 16 --epochs 3 --log-every 3 --micro-batch"
    assert run(pretrain, *pretraining(demo, tmp_path, *more.split(), micro_batch)) is None
    assert [line["effective_rank"] for line in cmaev.read_log(tmp_path)] == [8, 16, 24]


def test_demo_from_nothing_to_finished(tmp_path, monkeypatch, capsys):
    """`python pretrain.py` at its smallest: makes the videos, trains, writes all its files."""
    make_demo, folder = demo_videos.make_demo, Path("runs/pretrain-demo")
    monkeypatch.setattr(demo_videos, "make_demo", lambda folder: make_demo(folder, train=8, val=1))
    monkeypatch.chdir(tmp_path)
    command = "--encoder vit_test --epochs 2 --warmup-epochs 1 --batch-size 4 --log-every 3 --repeats 2"
    assert run(pretrain, *command.split()) is None
    log, settings = cmaev.read_log(folder), json.loads((folder / "settings.json").read_text())
    assert [line["step"] for line in log] == [1, 3, 6, 8] and log[-1]["epoch"] == 2
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert log[-1]["loss"] == pytest.approx(log[-1]["reconstruction"] + 0.14 * log[-1]["contrast"])
    assert settings["settings"]["lr"] == pretrain.RECIPES["demo"]["lr"]
    assert settings["torch"] == torch.__version__
    assert cmaev.read_image(folder / "reconstruction-000008.png").shape == (2 + 12 * 114, 2 + 8 * 114, 3)
    encoder = torch.load(folder / "encoder.pt", weights_only=True)["model"]
    assert {"patch_embed.proj.weight", "blocks.1.attn.q_bias", "norm.weight"} < encoder.keys()
    assert run(pretrain, *command.split()) is None
    output = capsys.readouterr().out
    for words in ("making the demo's videos", "note: 8 steps are few: for", "step 8/8", "left", "is finished"):
        assert words in output


# Fine-tuning ------------------------------------------------------------------------------------------------

def test_training_clips(demo, monkeypatch):
    """Repeated sampling opens a video once; a sample is a pure function; flips only where the recipe says."""
    opened, video, leaning = [], cmaev.Video, {True: set(), False: set()}
    monkeypatch.setattr(cmaev, "Video", lambda path: (opened.append(path), video(path))[1])
    augment = finetune.training_augmentation(32, 0.5, flip=True, rand_augment=True, erasing=0.25)
    clips = finetune.TrainClips(cmaev.read_list(demo / "train.txt"), 4, 4, "dense", augment, repeats=3)
    sample = clips[0, 5]
    assert len(opened) == 1 and sample["label"].tolist() == [5, 5, 5]
    assert sample["clip"].shape == (3, 4, 3, 32, 32)
    assert all(torch.equal(sample[name], clips[0, 5][name]) for name in sample)
    for other in (sample["clip"][1], clips[1, 5]["clip"][0]):
        assert not torch.equal(sample["clip"][0], other)
    flips = {name: recipe.get("flip", True) for name, recipe in finetune.RECIPES.items()}
    assert flips == dict(demo=False, small=True, k400=True, ssv2=False)
    for flip, seen in leaning.items():
        augment = finetune.training_augmentation(32, 0.5, flip, rand_augment=False, erasing=0)
        for i in range(30):
            with cmaev.seeded(i):
                ramp = augment(torch.arange(32, dtype=torch.uint8).expand(2, 3, 32, 32))
            seen.add(bool(ramp[0, 0, 0, -1] > ramp[0, 0, 0, 0]))
    assert leaning == {True: {True, False}, False: {True}}
    clips.repeats = 4000
    with cmaev.seeded(0):
        starts, counts = clips.frame_indices(16)[:, 0].unique(return_counts=True)
    assert starts.tolist() == [0, 1, 2, 3] and (counts - 1000).abs().max() < 110  # four standard deviations


@pytest.mark.parametrize("sampling, frames, times", [
    ("dense", 60, [[0, 4, 8, 12], [47, 51, 55, 59]]), ("dense", 10, [[0, 4, 8, 9]] * 2),
    ("dense", 24, [[0, 4, 8, 12], [3, 7, 11, 15], [7, 11, 15, 19], [11, 15, 19, 23]]),
    ("dense", 24, [[6, 10, 14, 18]]), ("uniform", 60, [[7, 22, 37, 52]]),
    ("uniform", 60, [[0, 15, 30, 45], [7, 22, 37, 52]]), ("uniform", 3, [[0, 0, 1, 2], [0, 1, 1, 2]]),
    ("uniform", 60, [[0, 15, 30, 45], [5, 20, 35, 50], [10, 25, 40, 55]])])
def test_views_against_a_plain_decode(tmp_path, sampling, frames, times):
    """A wide video: clips over time x 3 crops from its left to its right edge; in training, random places."""
    path = write_noise(tmp_path / "wide.mp4", size=(32, 79), frames=frames, pixels="yuv444p")
    decoded = torch.from_numpy(decode_all(path)).permute(0, 3, 1, 2)
    for crops, lefts in ((3, (0, 23, 47)), (1, [23])):
        sample = finetune.TestViews([(path, 1)], 4, 4, 32, sampling, len(times), crops)[0, 0]
        expected = [decoded[indices][..., left:left + 32] for indices in times for left in lefts]
        assert torch.equal(sample["clip"], torch.stack(expected))
    offsets = torch.rand(8)
    expected = [int((i + offset) * frames / 8) for i, offset in enumerate(offsets.tolist())]
    assert finetune.uniform_indices(frames, 8, offsets).tolist() == expected


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_labels_are_the_shares_of_the_pixels(mixup, cutmix):
    """Clip i is filled with the number 10^i, so that the mean of a mixed clip tells whose pixels it has."""
    mix, values = finetune.mixing(mixup, cutmix, classes=3), 10.0 ** torch.arange(3)
    labels = torch.tensor([2, 0, 1])
    for i in range(10):
        with cmaev.seeded(i):
            clips, soft = mix(values.view(3, 1, 1, 1, 1).expand(-1, 3, 2, 8, 8), labels)
        expected = soft[:, labels].double() @ values.double()
        assert clips.double().mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
        assert soft.sum(dim=1) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("name, sizes", {"vit": {}, "convvit": dict(fusion=False)}.items())
def test_layer_decay_by_name(name, sizes):
    model = finetune.Classifier(small_encoder(name, **sizes), "abcde")
    scales = {"fc_norm": 0, "head": 0, "patch_embed": 3, "embed_norms": 3, "blocks1": 3, "blocks2": 3}
    scales |= {f"{blocks}.{i}.": 2 - i for i in range(2) for blocks in ("blocks", "blocks3")}
    names = {id(p): name.removeprefix("encoder.") for name, p in model.named_parameters()}
    for group in finetune.layer_groups(model, 0.05, 0.5):
        for p in group["params"]:
            name = names.pop(id(p))
            power, = {power for start, power in scales.items() if name.startswith(start)}
            assert (group["scale"], group["weight_decay"]) == (0.5**power, 0.05 if p.ndim > 1 else 0), name
    assert not names


def test_probes_and_report(tmp_path):
    centres, labels = torch.randn(5, 16) * 4, torch.arange(100) % 5
    train, test = (centres[labels] + 0.3 * torch.randn(100, 16) for _ in range(2))
    for probe in (finetune.linear_probe, finetune.nearest_neighbours):
        scores = probe(train, labels, test, 5)
        assert (scores.argmax(dim=1) == labels).all()
        assert scores.sum(dim=1) == pytest.approx([1] * 100, abs=1e-4)
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    videos = [("a.mp4", 0), ("b.mp4", 1), ("c.mp4", 1), ("d.mp4", 2)]
    assert finetune.report(scores, videos, ["x", "y", "z"], tmp_path) == (50, 100)
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert rows[2] == "b.mp4,y,z,0.7000,y,0.2000,x,0.1000" and len(rows) == 5


def test_classes_of_folders_and_lists(tmp_path):
    """Test videos are matched by class folder or label, whichever training had."""
    touch(tmp_path, *(f"train/{name}/1.mp4" for name in ("apple", "banana", "cherry")),
          "val/apple/1.mp4", "val/cherry/1.mp4")
    labelled = lambda name: finetune.read_labelled(tmp_path / name)
    names = finetune.class_names(labelled("train"), tmp_path / "train")
    labels_of = lambda name: [i for _, i in finetune.numbered(labelled(name), [*names], name)]
    assert list(names.items()) == [(name, name) for name in ("apple", "banana", "cherry")]
    assert labels_of("train") == [0, 1, 2] and labels_of("val") == [0, 2]
    write_list(tmp_path / "list.txt", [("val/apple/1.mp4", 0)])
    touch(tmp_path, "val/durian/1.mp4")
    for name, words in (("list.txt", "apple/1.mp4 is of class 0: training has apple to cherry"),
                        ("val", "durian/1.mp4 is of class durian: training has")):
        with pytest.raises(cmaev.CMAEVError, match=words):
            labels_of(name)
    names = finetune.class_names([("a/1.mp4", 10), ("b/1.mp4", 2), ("b/2.mp4", 2)])
    assert names == {2: "b", 10: "a"} and list(names) == [2, 10]
    assert finetune.class_names([("a/1.mp4", 0), ("a/2.mp4", 1)]) == {0: "0", 1: "1"}  # they share a folder
    assert finetune.class_names([("a/1.mp4", 0), ("b/2.mp4", 0)]) == {0: "0"}
    assert finetune.numbered([("x.mp4", 10), ("y.mp4", 2)], [*names], "") == [("x.mp4", 1), ("y.mp4", 0)]


def test_a_tenth_of_each_class_is_held_out():
    videos = [(f"{i}.mp4", label) for label in "abc" for i in range(25)] + [("one.mp4", "d")]
    train, tests = finetune.hold_out(videos, 0)
    assert sorted(train + tests) == sorted(videos) and [label for _, label in tests] == list("aabbcc")
    assert tests == finetune.hold_out(videos, 0)[1] != finetune.hold_out(videos, 1)[1]


@pytest.mark.parametrize("names, part", [
    ("train/a/1.mp4 val/a/2.mp4", "train"), ("Train/a/1.mp4 TEST/a/2.mp4 notes/x.txt", "TEST"),
    ("train/1.mp4", "train"), ("train_256/a/1.mp4 val_256/a/1.mp4 frames/1.mp4", "train_256"),
    ("test/1.mp4 bus/1.mp4", ""), ("trains/1.mp4 value/1.mp4", "")])
def test_parts_of_a_data_set_are_not_classes(tmp_path, names, part):
    """Unless most folders have other names: a class may be called test."""
    touch(tmp_path, *names.split())
    error = pytest.raises(cmaev.CMAEVError, match=f"holds a data set's parts .*{part}.*, not classes")
    with error if part else contextlib.nullcontext():
        assert [label for _, label in cmaev.read_list(tmp_path)] == [0, 1]


def test_names_from_a_file(demo, tmp_path):
    """--names names a list's labels, in the report and in predictions; a list may lack classes."""
    videos = [video for video in cmaev.read_list(demo / "train.txt") if video[1] != 3]
    listed, names = write_list(tmp_path / "list.txt", videos), tmp_path / "names.txt"
    nine, ten = ("\n".join(f"Bewegung nach {i}, größer" for i in range(n)) for n in (9, 10))
    for content in (nine.encode(), b"", ten.encode("latin-1"), ten.encode("utf-16"), ten.encode("utf-16-le"),
                    f"\n{ten}".encode(), f"{ten}\r\n{nine}".encode()):
        names.write_bytes(content)
        with pytest.raises(cmaev.CMAEVError, match="0 to 9, a name of its own, one per line, in UTF-8"):
            finetune.class_names(videos, listed, names)
    with pytest.raises(cmaev.CMAEVError, match="--names is for lists"):
        finetune.class_names(videos, demo / "train", names)
    names.write_text(f"{ten}\n\n", encoding="utf-8-sig")
    more = f"""--data {listed} --names {names} --encoder vit_test --init none --subset 8 --epochs 2 --val-every 0
        --segments 1 --crops 1"""
    assert run(finetune, *finetuning(demo, tmp_path / "run", *more.split())) is None
    assert not (tmp_path / "run" / "best.pt").exists()
    assert ',"Bewegung nach 0, größer",' in (tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8")
    assert {name for name, _ in finetune.load(tmp_path / "run").predict(videos[0][0])} == set(ten.split("\n"))


def test_evaluation_of_a_run(demo, tuned, capsys):
    """Of the videos that it held out; a flag by hand wins. The log has one view's top-1, best.pt its best."""
    report = (tuned / "predictions.csv").read_text()
    rows = [row.split(",")[:2] for row in report.splitlines()[1:]]
    assert len(rows) == 10 and dict(cmaev.read_list(demo / "train.txt")).items() >= {
        (path, demo_videos.DEMO_CLASSES.index(name)) for path, name in rows}
    validated = {line["step"]: line["val_top1"] for line in cmaev.read_log(tuned) if "val_top1" in line}
    best = max(validated, key=validated.get)  # the first one
    assert list(validated) == [4, 6, 9] and checkpoint_of(tuned)["step"] == 9
    assert torch.load(tuned / "best.pt", weights_only=True)["step"] == best
    for more, folder, words in (
            ("--seed 1", "checkpoint-32-2x2", "of 10 videos, 2 x 2 views of 32 x 32, 10 classes"),
            ("--segments 1 --size 40", "checkpoint-40-1x2", "1 x 2 views of 40 x 40"),
            ("--segments 1 --crops 1", "checkpoint-32-1x1", f"top-1 {validated[9]:.2f} %"),
            ("--segments 1 --crops 1 --best", "best-32-1x1", f"top-1 {validated[best]:.2f} %")):
        assert run(finetune, "--out", tuned, "--workers", 0, "--eval", *more.split()) is None
        assert words in capsys.readouterr().out
        evaluated = (tuned / f"eval-{folder}" / "predictions.csv").read_text()
        assert (evaluated == report) == (folder == "checkpoint-32-2x2")
    assert (tuned / "predictions.csv").read_text() == report


def test_predictions_of_a_run(tuned, tmp_path, monkeypatch, capsys):
    rows = [row.split(",") for row in (tuned / "predictions.csv").read_text().splitlines()]
    path, _, best, share, *_ = rows[4]
    name, probability = finetune.load(tuned).predict(path)[0]
    assert name == best and probability == pytest.approx(float(share), abs=1e-4)
    monkeypatch.chdir(tmp_path)
    shutil.copy(path, "-x.mp4")
    assert run(finetune, "--out", tuned, "--workers", 0, "--predict", "./-x.mp4", rows[5][0]) is None
    answer = capsys.readouterr().out
    assert answer.startswith(f"./-x.mp4: {best} {probability:.1%}, ") and answer.count("%") == 10
    model, video = finetune.load(tuned), cmaev.Video(path)
    frames = video.read(range(len(video)))
    assert model.predict(frames) == model.predict(frames.flip(3).numpy()[..., ::-1]) == model.predict(path)
    for wrong in (frames.float(), frames[..., :2], frames[:0]):
        with pytest.raises(cmaev.CMAEVError, match="give a path, or a video's frames"):
            model.predict(wrong)
    with pytest.raises(cmaev.BadVideo, match="list.txt: cannot be opened"):
        model.predict(write_list(Path("list.txt"), []))


def test_features_are_the_encoders(demo, undisturbed, tmp_path, capsys):
    """Features, labels and paths; what cannot be written is known before anything is computed."""
    videos = cmaev.read_list(demo / "val.txt")[:3] + [(str(demo / "train.txt"), None)]
    listed = write_list(tmp_path / "list.txt", videos)
    arguments = ["--features", tmp_path / "out.npz", "--data", listed, "--init", undisturbed, "--workers", 0]
    assert run(finetune, *arguments, "--amp", "none", "--batch-size", 2) is None
    assert "features of 4 videos, 1 x 1 views each" in capsys.readouterr().out
    stored, encoder = np.load(tmp_path / "out.npz"), cmaev.load_encoder(undisturbed).eval()
    assert stored["paths"].tolist() == [path for path, _ in videos]
    assert stored["labels"].tolist() == [*(label for _, label in videos[:3]), -1]
    assert stored["features"].dtype == np.float32 and np.isnan(stored["features"][3]).all()
    clips = finetune.TestViews(videos, 4, 4, 32, "dense")
    for i in range(3):
        expected = encoder(cmaev.normalize(clips[0, i]["clip"])).mean(dim=(0, 1))
        torch.testing.assert_close(torch.from_numpy(stored["features"][i]), expected.detach())
    assert "give --init" in run(finetune, *arguments, "--init", "none")
    for target in tmp_path / "lost" / "out.npz", tmp_path:
        assert f"--features {target} cannot be written" in run(finetune, *arguments, "--features", target)
    assert "features of" not in capsys.readouterr().out


def test_sizes_and_recipe_come_from_init(demo, undisturbed, tmp_path, monkeypatch, capsys):
    """A run tells both, its weights alone the sizes; a flag by hand wins. One view for features, if not given."""
    def settings_of(init, *arguments):
        command = ["finetune.py", f"--init={init}", "--data", demo / "train.txt", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        s = finetune.read_settings()
        return s, {name: getattr(s, name) for name in told}
    told = dict(encoder="vit_tiny", frames=4, size=32, tubelet=2, patch=8)
    run_of = shutil.copytree(undisturbed, tmp_path / "run")
    record = json.loads((run_of / "settings.json").read_text())
    record["settings"]["recipe"] = "small"
    (run_of / "settings.json").write_text(json.dumps(record))
    s, sizes = settings_of(run_of)
    assert sizes == told and [s.recipe, s.epochs, s.segments, s.crops, s.val] == ["small", 75, 5, 3, ""]
    assert capsys.readouterr().out == ""
    s, sizes = settings_of(run_of, "--recipe", "ssv2", "--size", 40, "--patch=8")
    assert sizes == told | dict(size=40) and [s.recipe, s.sampling] == ["ssv2", "uniform"]
    assert capsys.readouterr().out == f"note: --size 40, as given, not the 32 of {run_of}\n"
    file = shutil.copy(undisturbed / "encoder.pt", tmp_path)
    with pytest.raises(cmaev.CMAEVError, match="--data without --recipe"):
        settings_of(file)
    assert settings_of(file, "--recipe", "k400")[1] == told
    plain = cmaev.build_encoder("convvit_tiny", fusion=False, frames=4, size=64)
    cmaev.save_encoder(plain, tmp_path / "convvit.pt")
    for more, views in (("--probe knn", [1, 1]), ("--probe knn --segments 2", [2, 1]),
                        ("--features x.npz", [1, 1]), ("--features x.npz --crops 3", [1, 3])):
        s, sizes = settings_of(tmp_path / "convvit.pt", "--recipe", "k400", *more.split())
        assert sizes == dict(encoder="convvit_tiny", frames=4, size=64, tubelet=2, patch=16)
        assert [s.segments, s.crops] == views and not s.fusion
    settings = dict(recipe="k400", encoder="convvit_tiny", frames=4, size=64, tubelet=2, patch=16, fusion=True)
    (tmp_path / "settings.json").write_text(json.dumps(dict(settings=settings)))  # as of a fine-tuned ConvViT
    shutil.copy(tmp_path / "convvit.pt", tmp_path / "encoder.pt")
    assert not settings_of(tmp_path, "--probe", "knn")[0].fusion


def test_a_run_is_fine_tuned_and_probed_without_its_flags(demo, undisturbed, tmp_path, capsys):
    """Its weights are of 4 frames of 32 x 32, the recipe's clips of 8 of 56 x 56. The classes are folders."""
    usual = f"--init {undisturbed} --data {demo}/train --val {demo}/val --subset 8 --workers 0 --amp none"
    training = f"--epochs 1 --warmup-epochs 0 --batch-size 8 --out {tmp_path}"
    assert run(finetune, *usual.split(), *training.split()) is None
    output, model = capsys.readouterr().out, finetune.load(tmp_path)
    assert "8 videos of 10 classes (bobbing to up), 1 steps" in output
    assert " of 10 videos, 1 x 1 views of 32 x 32" in output
    assert (model.encoder.grid, model.encoder.cube) == ((2, 4, 4), (2, 8, 8)) and model.views.size == 32
    for probe in ("linear", "knn"):
        assert run(finetune, *usual.split(), "--probe", probe) is None
        output = capsys.readouterr().out
        assert "features of 8 videos, 1 x 1 views each" in output and "note: " not in output
        assert f"{probe} probe of {undisturbed}: top-1 " in output and " of 10 videos, 8 labels" in output


def test_export_of_a_run(tuned, tmp_path):
    assert run(export, tuned, tmp_path / "folder") is None
    state, model = cmaev.read_weights(tmp_path / "folder")[0], finetune.load(tuned)
    assert torch.equal(state["head.weight"], model.head.weight) and len(state) == len(model.state_dict())
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert list(config["label2id"]) == model.names
    assert config["architectures"] == ["VideoMAEForVideoClassification"]


def test_ranks_score_every_video_once(demo, tuned):
    """Ten videos on three ranks. Forked, as an import of torch takes seconds."""
    command, fork = finetuning(demo, tuned, "--eval", "--batch-size", 12), multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one

    def score_as_rank(rank):
        torch.set_num_threads(1)  # OpenMP's other threads are not forked
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.exit(run(finetune, *command))
    shutil.rmtree(tuned / "eval-checkpoint-32-2x2", ignore_errors=True)
    ranks = [fork.Process(target=score_as_rank, args=(rank,), daemon=True) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    report = tuned / "eval-checkpoint-32-2x2" / "predictions.csv"
    assert report.read_text() == (tuned / "predictions.csv").read_text()


# Faults: kills, bad numbers, bad videos, bad weights, full disks, hostile files --------------------------------------

@slow
@pytest.mark.parametrize("script", [pretrain, finetune])
def test_faults_a_run_ended_anywhere_goes_on_the_same(demo, undisturbed, tuned, script):
    """Ctrl-C and SIGTERM save and leave nothing running. kill -9 comes while a checkpoint is written, and at
    random; right after, the run goes on. Nobody else trains in its folder. The number of workers changes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore Ctrl-C
    folder, rng, groups = demo.parent / f"ended-{script.__name__}", np.random.default_rng(0), []
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    partial = Path(f"{checkpoint}.partial")
    ends = {signal.SIGINT: 130, signal.SIGTERM: cmaev.SAVED_AND_STOPPED}
    kills = (20 if LONG else 2) * [signal.SIGKILL]
    command, expected, sent = pretraining(demo, folder), undisturbed, [*ends, *kills]
    if script is finetune:  # its signals are those of pretrain.py
        command, expected, sent = finetuning(demo, folder, "--init", undisturbed), tuned, kills
    num_lines = lambda: len(log.read_bytes().splitlines()) if log.exists() else 0
    for i, number in enumerate(sent):
        began, before, every = time.time(), num_lines(), 1000 if number in ends else 1
        more = "--save-every", every, "--workers", 2 - i % 3
        process = start(script, *command, *more, start_new_session=True)
        groups.append(process.pid)
        if number in ends:
            assert wait_for(lambda: num_lines() > before, process), process.stderr.read()
            os.killpg(process.pid, number)  # to the decoding processes, too, as a terminal and SLURM do
            assert process.wait(60) == ends[number], process.stderr.read()
            assert all_ended(process.pid, seconds=10)
            assert checkpoint_of(folder)["step"] == cmaev.read_log(folder)[-1]["step"]
        elif i % 2 == 0:
            wait_for(checkpoint.exists, process)
            if wait_for(partial.exists, process):  # the last kills come after the end
                process.send_signal(signal.SIGSTOP)
                refused = run(script, *command)
        else:
            wait_for(lambda: log.stat().st_mtime > began, process)
            time.sleep(rng.uniform(0, 1))
        process.kill()
        process.wait()
    end = run(script, *command, "--workers", 2)
    assert end is None and f"{folder} is in use by another process" in refused
    assert all_ended(*groups) and not partial.exists() and log_of(folder) == log_of(expected)
    assert_same_weights(folder, expected)
    if script is finetune:
        assert (folder / "predictions.csv").read_text() == (tuned / "predictions.csv").read_text()
        assert_same_weights(folder, tuned, "best.pt")


@slow
def test_faults_a_lost_node(demo, undisturbed, tmp_path, monkeypatch):
    """A run of one process goes on on two nodes of one process each. One is killed: torchrun starts both again."""
    command = pretraining(demo, tmp_path, "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(cmaev, "notice_signals", lambda: lambda: signal.SIGTERM)
        assert run(pretrain, *command) == str(cmaev.SAVED_AND_STOPPED)
    (tmp_path / "lock").unlink()  # this process holds it
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one
    launch = f"""-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=2 --rdzv_id=lost
        --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port}"""
    launched = [sys.executable, *launch.split(), HERE / "pretrain.py", *command]
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see README
    agents = [subprocess.Popen(launched, env=env) for _ in range(2)]
    assert wait_for(lambda: len(cmaev.read_log(tmp_path)) > 1, agents[0], 240)
    os.kill(children(agents[1])[-1], signal.SIGKILL)
    assert [agent.wait(300) for agent in agents] == [0, 0]
    assert_same_but_for_rounding(tmp_path, undisturbed)


def test_faults_bad_numbers_end_a_run(demo, tmp_path, monkeypatch):
    """Twenty in a row; the checkpoint is from before."""
    forward, steps = cmaev.CMAEV.forward, itertools.count(1)

    def spoilt_forward(self, *batch):
        losses = forward(self, *batch)
        return losses | {"loss": losses["loss"] * (math.nan if next(steps) in (3, *range(9, 40)) else 1)}
    monkeypatch.setattr(cmaev.CMAEV, "forward", spoilt_forward)
    more = f"--encoder vit_test --batch-size 2 --epochs 2 --log-every 1 --seed {2**64 - 1}"
    end = run(pretrain, *pretraining(demo, tmp_path, *more.split()))
    assert end.startswith("error: step 28: 20 steps in a row had a loss or a gradient that is not finite")
    log, checkpoint = cmaev.read_log(tmp_path), checkpoint_of(tmp_path)
    assert [line["skipped_steps"] for line in log[:9]] == [0, 0, *6 * [1], 2]
    for name in ("grad_norm", "loss"):  # a line of one step
        assert [line["step"] for line in log if math.isnan(line[name])] == [3, *range(9, 28)]
    text = (tmp_path / "log.jsonl").read_text()
    assert text.count("null") == 5 * 20 and "NaN" not in text and "Infinity" not in text
    assert checkpoint["step"] == 27 and all(x.isfinite().all() for x in checkpoint["model"].values())


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("max_norm", [0.0, 3.0, 9.0])
@pytest.mark.parametrize("large", [1e25, 1e38])
def test_faults_a_step_is_clipped_as_by_torch_and_skipped_if_not_finite(dtype, max_norm, large):
    """Also if only the norm of its gradient is too large for float32. A skipped step changes nothing."""
    layer, cpu, losses = torch.nn.Linear(4, 1), torch.device("cpu"), []
    plain, scaler, meter = deepcopy(layer), cmaev.grad_scaler(dtype, cpu), cmaev.Meter(["loss"], cpu)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    for factor in (1.0, math.nan, math.inf, large, 3.0):
        losses.append(layer(torch.ones(1, 4)).sum() * factor)
        scaler.scale(losses[-1]).backward()
        grad_norm = cmaev.optimizer_step(layer.parameters(), optimizer, scaler, dtype, max_norm)
        meter.add([losses[-1].detach()], grad_norm, torch.zeros(()))
        if factor in (1, 3):
            plain_optimizer.zero_grad()
            (plain(torch.ones(1, 4)).sum() * factor).backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm or math.inf)
            plain_optimizer.step()
            assert grad_norm == pytest.approx(norm)
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())
        torch.testing.assert_close(optimizer.state_dict(), plain_optimizer.state_dict())
    record = meter.read(5, 1, 1, 1)
    assert record["loss"] == pytest.approx((losses[0] + losses[4]).item() / 2)
    assert record["skipped_steps"] == 3 and scaler.get_scale() == (2**13 if dtype else 1)


@pytest.mark.parametrize("before, after, scale", [
    (torch.bfloat16, torch.float16, 2**16), (None, torch.float16, 2**16), (torch.float16, torch.bfloat16, 1),
    (torch.float16, torch.float16, 2**15), (torch.bfloat16, None, 1)])
def test_another_precision_starts_with_its_own_loss_scale(tmp_path, before, after, scale):
    scales = []
    for dtype in (before, after):  # each resumes, and skips a step
        layer, cpu = torch.nn.Linear(4, 1), torch.device("cpu")
        optimizer, scaler = torch.optim.AdamW(layer.parameters(), fused=True), cmaev.grad_scaler(dtype, cpu)
        state = dict(model=layer, optimizer=optimizer, scaler=scaler, meter=cmaev.Meter([], cpu))
        cmaev.resume(tmp_path, state)
        scales.append(scaler.get_scale())
        scaler.scale(layer(torch.ones(1, 4)).sum() * math.nan).backward()
        cmaev.optimizer_step(layer.parameters(), optimizer, scaler, dtype)
        cmaev.save_checkpoint(tmp_path, 1, state)
    assert scales[1] == scale


def test_faults_torn_lines(tmp_path, undisturbed):
    """In the list of bad videos they are passed over, in a log they are removed or named."""
    bad, log = tmp_path / "bad.jsonl", tmp_path / "log.jsonl"
    bad.write_bytes(b'{"path": "a.m\n\n[]\n\xff\0\n{"reason": "b.mp4"}\n')
    for name in 2 * ("a.mp4", "b.mp4"):
        cmaev.log_bad_video(name, f"{name}: bad", bad)
    lines = bad.read_bytes().splitlines()
    assert [json.loads(line)["path"] for line in lines[5:]] == ["a.mp4", "b.mp4"]
    good = (undisturbed / "log.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(good) + good[0][:9])
    assert cmaev.read_log(tmp_path) == cmaev.read_log(undisturbed)
    log.write_text(good[0] + "\0\0\n" + good[1])
    for read in (cmaev.read_log, lambda run: cmaev.resume(run, {"model": torch.nn.Linear(1, 1)})):
        with pytest.raises(cmaev.CMAEVError, match="log.jsonl is damaged"):
            read(tmp_path)


@pytest.fixture(scope="module")
def spoilt(demo, wrong):
    """Files made from good ones in seven ways (absurd durations and sizes, too); some still play.

    mixed.txt lists them in front of the good ones."""
    rng, zeros = np.random.default_rng(0), demo.parent / "zeros.mp4"
    zeros.write_bytes(bytes(5000))
    spoilt = [wrong / "audio.mp4", wrong / "text.mp4", zeros]
    good = [write_noise(demo.parent / name, codec) for name, codec in (
        ("x.mkv", "libx264"), ("x.avi", "libx264"), ("x.webm", "libvpx"))]
    good += [Path(path) for path, _ in cmaev.read_list(demo / "train.txt")]
    for i in range(300 if LONG else 60):
        source = good[i % len(good)]
        data = source.read_bytes()
        at, flipped = rng.integers(len(data)), np.frombuffer(data, np.uint8).copy()
        flipped[rng.integers(0, len(data), 30)] ^= np.uint8(1 << rng.integers(8))
        suffix = [".avi", ".webm", ".ts"][i % 3] if i % 7 == 0 else source.suffix  # the content stays
        spoilt.append(demo.parent / f"spoilt-{i}{suffix}")
        spoilt[-1].write_bytes([
            data, data[:at], data[:at] + rng.bytes(len(data) - at), flipped.tobytes(),
            data[:at] + bytes(2000) + data[at + 2000:], re.sub(rb"(?s)(mvhd.{16}).{4}", rb"\1" + 4 * b"\xff", data),
            re.sub(rb"(?s)(tkhd.{76}|stsd.{40}).{4}", rb"\1" + 4 * b"\xff", data)][i % 7])
    write_list(demo.parent / "mixed.txt", [(path, None) for path in [*spoilt, *(good * (8 if LONG else 1))]])
    return spoilt


def test_faults_bad_videos_are_replaced(demo, spoilt, tmp_path):
    """Each is read or replaced, in time, without growth; the replacement is a pure function, and is named."""
    clips, times, used, log = pretrain_clips(demo), [], [], tmp_path / "replaced.jsonl"
    clips.videos, clips.log = cmaev.read_list(demo.parent / "mixed.txt"), log
    gc.collect()
    gc.disable()  # reference cycles are not freed
    for i in (60 if LONG else 3) * [*range(len(spoilt))]:
        began = time.monotonic()
        clips[0, i]
        times.append(time.monotonic() - began)
        if i == len(spoilt) - 1:
            used.append(usage())
    gc.enable()
    memory, files = zip(*used)
    reasons = {line["path"]: line["reason"] for line in map(json.loads, log.open())}
    print(f"{len(reasons)} of {len(spoilt)} bad, slowest {max(times):.2f} s, memory {memory} MiB")
    assert memory[-1] < memory[0] + 30 and len(set(files)) == 1 and max(times) < 10
    assert len(spoilt) // 4 <= len(reasons) == len(log.open().readlines())
    assert all(path in reason for path, reason in reasons.items())
    one, two = clips[1, 0], clips[1, 0]
    assert all(torch.equal(one[name], two[name]) for name in one) and one["replaced"].all()
    gone = Path(shutil.copy(clips.videos[-1][0], tmp_path / "gone.mp4"))
    clips.videos = [(str(gone), None), *clips.videos[-8:]]
    assert not clips[0, 0]["replaced"].any() and clips[0, 0]["video_index"] == 0
    gone.unlink()
    assert clips[0, 0]["replaced"].all() and clips[0, 0]["video_index"] > 0
    assert "no such file" in log.open().readlines()[-1]


def test_faults_bad_videos_are_named_once_counted_and_limited(demo, spoilt, tmp_path, capsys):
    """With processes, without, and in micro-batches."""
    listed, log = tmp_path / "some.txt", tmp_path / "again.jsonl"
    write_list(listed, cmaev.read_list(demo.parent / "mixed.txt")[::3])
    usual = "--data", listed, "--encoder", "vit_test", "--epochs", 2, "--workers"
    command = lambda out, *more: pretraining(demo, tmp_path / out, *usual, *more)
    paths_in = lambda file: [json.loads(line)["path"] for line in file.open()]
    assert run(pretrain, *command("all", 2, "--bad-share", 1)) is None
    output, named = capsys.readouterr().out, paths_in(tmp_path / "all" / "bad-videos.jsonl")
    clips = pretrain_clips(demo, seed=0, rate=4)
    clips.videos, clips.log = cmaev.read_list(listed), log
    steps = list(cmaev.batches(len(clips), 8, 2 * (len(clips) // 8), 0))
    counts = np.cumsum([sum(bool(clips[key]["replaced"]) for key in step) for step in steps])
    assert len(named) == len(set(named)) > 5 and set(named) == set(paths_in(log))
    assert cmaev.read_log(tmp_path / "all")[-1]["bad_clips"] == counts[-1] > len(named)
    assert f"; {counts[-1]} of {8 * len(steps)} clips were of bad videos" in output
    end = run(pretrain, *command("few", 0, "--log-every", 1, "--micro-batch", 4))
    too_many = np.argmax(counts > 0.05 * 8 * len(steps) // 2)
    assert end.startswith(f"error: {counts[too_many]} of {8 * (too_many + 1)} clips were of bad videos")
    assert end.endswith("or give a larger --bad-share")
    assert run(pretrain, *command("few", 0, "--bad-share", 1)) is None
    assert_same_weights(tmp_path / "few", tmp_path / "all")


def test_faults_a_bad_video_counts_as_wrong_in_testing(demo, tuned, wrong, tmp_path, capsys):
    rows = (tuned / "predictions.csv").read_text().splitlines()[1:]
    videos = [(row.split(",")[0], demo_videos.DEMO_CLASSES.index(row.split(",")[1])) for row in rows]
    bad = [(wrong / "audio.mp4", label) for label in range(10)]
    holed = write_list(tmp_path / "holed.txt", videos + bad)
    assert run(finetune, *finetuning(demo, tuned, "--eval", "--val", holed)) is None
    report = (tuned / "eval-checkpoint-32-2x2" / "predictions.csv").read_text().splitlines()[1:]
    right = [row.split(",")[1] == row.split(",")[2] for row in rows]
    assert report[:10] == rows and all(",unreadable,," in row for row in report[10:])
    output = capsys.readouterr().out
    assert "audio.mp4: has no" in output and f"top-1 {100 * sum(right) / 20:.2f} %" in output
    for probe in ("linear", "knn"):
        more = f"--probe {probe} --init none --data {holed} --val {holed} --segments 1 --crops 1"
        assert run(finetune, *finetuning(demo, tuned, *more.split())) is None
    end = run(finetune, *finetuning(demo, tuned, "--predict", wrong / "audio.mp4"))
    assert end == "error: 1 of 1 files could not be read"


def test_faults_damaged_and_hostile_weights(undisturbed, tmp_path):
    """Truncated, with one bit altered, and with code in it, which is not run."""
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    data, file = bytearray((undisturbed / "encoder.pt").read_bytes()), tmp_path / "encoder.pt"
    half = len(data) // 2
    for damaged in (data[:half], data[:half] + bytes([data[half] ^ 1]) + data[half + 1:]):
        file.write_bytes(damaged)
        for read in (cmaev.read_weights, cmaev.load_tensors):
            with pytest.raises(cmaev.CMAEVError, match="cannot be read"):
                read(file)
    torch.save({"model": Payload()}, file)
    with pytest.raises(cmaev.CMAEVError, match="encoder.pt cannot be read as weights"):
        cmaev.load_encoder(file, small_encoder("vit"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values, words", [
    ((math.nan, -math.inf), "blocks.0.mlp.fc1.weight holds NaN or inf"),
    ((3e38, 3e38), "the model computes NaN or inf from clips that are fine")])
def test_faults_weights_that_are_not_finite(demo, undisturbed, tuned, tmp_path, values, words):
    """The error is about the weights, not about the videos."""
    files = undisturbed / "encoder.pt", tuned / "checkpoint.pt"
    for file, prefix, value in zip(files, ("", "encoder."), values):
        state = torch.load(file)
        state["model"][f"{prefix}blocks.0.mlp.fc1.weight"][:] = value
        torch.save(state, tmp_path / file.name)
    shutil.copy(tuned / "settings.json", tmp_path)
    init, out = ("--val", demo / "val.txt", "--init", tmp_path / "encoder.pt"), tmp_path / "out"
    commands = [(finetune, *finetuning(demo, out, *init, *more)) for more in (
        ("--features", out), ("--probe", "knn"))] + [(finetune, *finetuning(demo, tmp_path, "--eval"))]
    if math.isnan(values[0]):
        commands += [(finetune, *finetuning(demo, out, *init)), (pretrain, *pretraining(demo, out, *init)),
                     (finetune, "--out", tmp_path, "--predict", demo / "val/left/00000.mp4")]
    for script, *arguments in commands:
        assert words in run(script, *arguments)


def test_faults_full_disk(tmp_path):
    """A limit on the size of files stands in for the disk."""
    model, limits = torch.nn.Linear(1000, 1000), resource.getrlimit(resource.RLIMIT_FSIZE)
    cmaev.save_checkpoint(tmp_path, 4, dict(model=model))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(cmaev.CMAEVError, match="checkpoint.pt cannot be written .File too large.: free space"):
            cmaev.save_checkpoint(tmp_path, 8, dict(model=model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_of(tmp_path)["step"] == 4 and not list(tmp_path.glob("*.partial"))
    with pytest.raises(cmaev.CMAEVError, match="No such file or directory.: free space or give another"):
        cmaev.save_checkpoint(tmp_path / "lost", 8, dict(model=model))


def test_faults_hostile_files(tmp_path):
    """Nothing of another file and no address is opened."""
    server, good = socket.create_server(("127.0.0.1", 0)), write_noise(tmp_path / "a.mp4", frames=5)
    server.settimeout(0.2)
    address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    hostile = {"list.m3u8": playlist.format(address), "list.mp4": playlist.format("a.mp4"),
               "concat.mp4": f"ffconcat version 1.0\nfile {good}\n",
               "manifest.mpd": f"<?xml version='1.0'?><MPD><Period><BaseURL>{address}</BaseURL></Period></MPD>"}
    for name, text in hostile.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(cmaev.CMAEVError, match="format is not allowed|Invalid data found"):
            cmaev.Video(tmp_path / name)
    for path in (address, f"concat:{good}", "/dev/zero"):
        with pytest.raises(cmaev.CMAEVError, match="no such file"):
            cmaev.Video(path)
    with pytest.raises(TimeoutError):
        server.accept()
    assert set(cmaev.CONTAINERS.split(",")) <= {part for name in av.formats_available for part in name.split(",")}


def test_faults_bounds_of_frames(tmp_path, monkeypatch):
    """Frames beyond the bounds are refused before they are made, and reading ends in time."""
    video = cmaev.Video(write_noise(tmp_path / "v.mp4", frames=20))
    too_large = "frames of 64x48 pixels are too large"
    for bound, value, read, words in (
            ("MAX_BYTES", 10 * 48 * 64 * 3, lambda: video.read(range(11)), f"11 {too_large}"),
            ("MAX_SECONDS", -1, lambda: video.read(range(3)), "takes more than -1 s"),
            ("MAX_PIXELS", 3000, lambda: cmaev.Video(tmp_path / "v.mp4"), "no frames in it, or too large")):
        with monkeypatch.context() as patch, pytest.raises(cmaev.CMAEVError, match=words):
            patch.setattr(cmaev, bound, value)
            assert bound != "MAX_BYTES" or len(video.read(range(10))) == 10
            read()


@takes_minutes
def test_faults_long_run_stays_flat(demo, spoilt):
    """2,000 steps on good and bad videos: memory, open files and processes of the trainer and its workers."""
    log, rows = demo.parent / "flat" / "log.jsonl", []
    more = f"""--data {demo.parent}/mixed.txt --bad-share 1 --workers 2 --batch-size 2 --epochs 10 --frames 2
        --size 16 --patch 4 --save-every 500"""
    process = start(pretrain, *pretraining(demo, log.parent, *more.split()))
    for step in range(200, 2001, 200):
        assert wait_for(lambda: log.exists() and f'"step": {step},' in log.read_text(), process, 600)
        pids = [process.pid, *children(process)]
        rows.append((*sum(map(usage, pids)), len(pids)))
    process.kill()
    print(rows)
    memory, files, processes = zip(*rows)
    assert memory[-1] < 1.03 * memory[1] and len(set(processes)) == 1
    assert np.mean(files[5:]) < np.mean(files[:5]) + 5  # samples in flight open and close files


# A GPU ------------------------------------------------------------------------------------------------------

class PretendedGPU(FakeTensorMode):
    """Tensors on the CPU are real. Those on the GPU have shapes and no values: whatever asks for one, as .item()
    and boolean indexing do, is an error, and so is work on tensors of both."""

    def dispatch(self, operation, types, args=(), kwargs=None):
        of_gpu = lambda x: isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda"
        if any(map(of_gpu, tree_leaves((args, kwargs)))):
            if operation is torch.ops.aten._to_copy.default:
                self.note_copy()
            return super().dispatch(operation, types, args, kwargs)
        with unset_fake_temporarily():
            return operation(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.8 wants a driver for this, 2.11 none")
@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set")
@pytest.mark.parametrize("script, copied, more", [
    (pretrain, 5, "--amp fp16 --micro-batch 4 --clip-grad 1"),
    (pretrain, 5, "--amp bf16 --encoder convvit_test --repeats 2"),
    (finetune, 3, "--amp fp16 --micro-batch 4 --init none")])
def test_steps_wait_for_no_device_and_mix_none(demo, tmp_path, monkeypatch, script, copied, more):
    """The log line after step 1 waits first. Feed copies all but the mask, on a stream of its own.

    Without backward passes, which the next test but two has.
    """
    def backward(loss):
        for p in models[0].parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    models, cuda, gpu = [], mock.MagicMock(), PretendedGPU(allow_non_fake_inputs=True)
    gpu.note_copy = cuda.copy
    for name in ("Stream", "stream", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", cuda.record_stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x: [torch.empty_like(x)])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(cmaev, "data_parallel", lambda model: models.append(model) or model)
    monkeypatch.setattr(cmaev, "join_ranks", lambda: torch.device("cuda", 0))
    arguments = pretraining if script is pretrain else finetuning
    with gpu, pytest.raises(DataDependentOutputException) as waits:
        run(script, *arguments(demo, tmp_path, "--encoder", "vit_test", *more.split()))
    assert cmaev.Meter.read.__code__ in [entry.frame.code.raw for entry in waits.traceback]
    calls = [name for name, *_ in cuda.mock_calls]
    began = calls.index("stream().__enter__")
    assert calls[began:began + 2 * copied + 4] == [
        "stream().__enter__", *copied * ["copy"], "stream().__exit__", "current_stream",
        "current_stream().wait_stream", *copied * ["record_stream"]]


@on_gpu
@both_encoders
def test_gpu_losses_and_gradients_are_the_cpus(encoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    results = []
    for device in ("cpu", "cuda"):
        model, (online, target, mask) = tiny_model(encoder)
        losses = model.to(device)(online.to(device), target.to(device), mask)
        losses["loss"].backward()
        results.append(({name: losses[name].item() for name in pretrain.METRICS}, gradients(model)))
    (expected, expected_grads), (losses, grads) = results
    assert losses == pytest.approx(expected, rel=1e-4)
    assert_close_gradients(grads, expected_grads, rtol=1e-3, atol=1e-5)


@on_gpu
def test_gpu_feed_brings_the_same_batches(demo):
    clips, busy, feeds = pretrain_clips(demo, repeats=2), torch.randn(4096, 4096, device="cuda"), []
    for device in map(torch.device, ("cpu", "cuda")):
        order = cmaev.batches(len(clips), 4, 12, 0)
        feeds.append(cmaev.Feed(cmaev.loader(clips, 2, device, batch_sampler=order), device))
    plain, feed = feeds
    for _ in range(12):
        expected, batch = next(plain), next(feed)
        for _ in range(10):
            busy = (busy @ busy).tanh()  # the copies run beside this
        for name, x in expected.items():
            assert batch[name].is_cuda == (name != "mask") and torch.equal(batch[name].cpu(), x), name
    torch.cuda.synchronize()
    assert 0 <= feed.waited() < 60


@on_gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16", "fp16 --micro-batch 2"])
@both_encoders
def test_gpu_step_never_waits_for_the_device(demo, monkeypatch, encoder, amp):
    device, losses = torch.device("cuda"), []
    more = ["--encoder", encoder, "--batch-size", 4, "--clip-grad", 1, "--amp", *amp.split()]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *pretraining(demo, "run", *more)])
    _, _, _, train_step = pretrain.build(pretrain.read_settings(), device)
    clips, meter = pretrain_clips(demo), cmaev.Meter(["loss"], device)
    parts = 2 if "micro" in amp else 1
    order = cmaev.batches(len(clips), 4, 8, 0, num_micro_batches=parts)
    feed = cmaev.Feed(cmaev.loader(clips, 0, device, batch_sampler=order), device)
    try:
        for step in range(8):
            if step == 3:  # memory and kernels are there by then
                torch.cuda.set_sync_debug_mode("error")
            step_losses, grad_norm, replaced = train_step(feed)
            losses.append(step_losses["loss"].detach())
            meter.add(losses[-1:], grad_norm, replaced)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and meter.read(8, 4, 2, 1)["skipped_steps"] == 0


@on_gpu
@pytest.mark.parametrize("encoder, amp", [
    ("vit_tiny", "bf16"), ("vit_tiny", "fp16"), ("vit_tiny", "bf16 --compile"), ("convvit_tiny", "none")])
def test_gpu_trains_resumes_and_fine_tunes(demo, tmp_path, monkeypatch, encoder, amp):
    usual = ["--workers", 2, "--encoder", encoder, "--amp", *amp.split()]
    command, log = pretraining(demo, tmp_path / "run", *usual), tmp_path / "run" / "log.jsonl"
    with monkeypatch.context() as patch:  # a signal at step 8
        second_line = lambda: len(log.open().readlines()) == 2
        patch.setattr(cmaev, "notice_signals", lambda: lambda: signal.SIGTERM * second_line())
        assert run(pretrain, *command) == str(cmaev.SAVED_AND_STOPPED)
    assert run(pretrain, *command) is None
    log = cmaev.read_log(tmp_path / "run")
    assert log[-1]["step"] == 20 and log[-1]["skipped_steps"] == 0 and log[-1]["loss"] < log[0]["loss"]
    assert all(0 <= line["data_wait"] < 1 and line["memory_mib"] > 0 for line in log)
    for how in ([], ["--probe", "linear"]):
        command = finetuning(demo, tmp_path / "tuned", "--init", tmp_path / "run", *usual, *how)
        assert run(finetune, *command) is None
