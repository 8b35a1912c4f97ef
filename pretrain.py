"""Pre-trains CMAE-V on video files: one loop for a laptop's CPU, one GPU, and torchrun over many nodes.

    python pretrain.py                                                   the demo, which makes its own videos
    python pretrain.py --recipe k400 --data train.txt --batch-size 64    one GPU
    torchrun --nproc_per_node=8 pretrain.py --recipe k400 --data train.txt
    python pretrain.py --recipe k400 --benchmark --compile --batch-size 64   how fast; with --data, also of reading it

The same command run again goes on from the last checkpoint. `python pretrain.py --help` lists the settings.
"""

import json
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from itertools import repeat
from pathlib import Path

import cmaev  # before torch: it says how OpenMP's threads wait

import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.io import write_png
from torchvision.utils import make_grid

LOSSES = ("loss", "reconstruction", "contrast", "accuracy")
DEMO = "data/demo/train.txt"

# One value, or one a recipe: demo, K400, SSv2. Where they come from: README, "Settings".
SETTINGS = {
    "data": ((DEMO, "", ""), "list file (`path label` a line) or folder of class folders"),
    "val": ("", "held-out videos: list or folder; each checkpoint then logs their reconstruction loss"),
    "out": (("runs/pretrain-demo", "runs/pretrain-k400", "runs/pretrain-ssv2"), "the run's folder"),
    "subset": (0, "only the first N videos of a seeded shuffle; 0: all"),
    # the model
    "encoder": (("vit_tiny", "vit_base", "vit_base"), ", ".join(cmaev.ENCODERS)),
    "fusion": (True, "ConvViT: add its stages 1 and 2 to the tokens (ConvMAE's multi-scale fusion)"),
    "frames": ((8, 16, 16), "frames a clip"),
    "size": ((48, 224, 224), "height and width of a clip, pixels"),
    "tubelet": (2, "frames a token"),
    "patch": ((8, 16, 16), "height and width of a token, pixels"),
    # the method
    "rate": ((4, 4, 2), "sampling rate r: every r-th frame"),
    "max-shift": ((4, 8, 4), "p: the target view starts 0 to p frames later; 0: no temporal shift"),
    "mask-ratio": (0.9, "share of masked tubes"),
    "contrast-weight": (0.14, "lambda_c; 0: VideoMAE or video ConvMAE, without a target branch"),
    "temperature": (0.07, "tau of InfoNCE"),
    "momentum": ((0.99, 0.996, 0.996), "of the target encoder"),
    "color-augment": (True, "colour augmentation of the target view"),
    "bad-share": (0.05, "largest share of clips whose video cannot be read; another video takes its place"),
    "repeats": (1, "clips out of each opened video; an epoch then has so many times the steps"),
    # optimisation
    "epochs": ((50, 800, 800), "passes over the videos"),
    "warmup-epochs": ((2, 40, 40), "epochs of linear warm-up"),
    "batch-size": ((16, 2048, 2048), "clips a step, over all ranks: the K of InfoNCE"),
    "lr": ((5e-3, 1.5e-4, 1.5e-4), "base learning rate, times batch size / 256"),
    "warmup-lr": (1e-6, "where the warm-up starts, times batch size / 256"),
    "min-lr": (1e-5, "where the cosine ends, times batch size / 256"),
    "beta1": (0.9, "AdamW"),
    "beta2": (0.95, "AdamW"),
    "weight-decay": (0.05, "AdamW; not on biases, norms and the mask token"),
    "clip-grad": (0.0, "largest gradient norm; 0: unlimited"),
    "seed": (0, "of the weights, the order and the samples"),
    "amp": ("auto", "auto, bf16, fp16 or none (float32); auto: what the device is fast at"),
    # the machine and the output: free to change between two starts of a run
    "compile": (False, "torch.compile"),
    "workers": (-1, "decoding processes a rank; -1: one a core beside a GPU, at most 16, and 2 on a CPU"),
    "log-every": ((50, 20, 20), "steps a log line"),
    "save-every": ((250, 1000, 1000), "steps a checkpoint"),
    "picture-every": ((250, 5000, 5000), "steps a picture of reconstructions; 0: none"),
    "results": ("", "file that a finished run adds a line of JSON to: its flags, its last losses"),
    "benchmark": (False, "only time 20 steps on synthetic clips, then on those of --data where it is given"),
}
FREE = cmaev.MACHINE | {"val", "bad_share"}


def main():
    s, by_hand = cmaev.read_settings(SETTINGS, __doc__.splitlines()[0])
    cmaev.check_own_data(by_hand)
    rank, world, device = cmaev.join_ranks()
    chief = rank == 0
    say = print if chief else lambda *_, **__: None

    # the videos
    with cmaev.chief_first():
        if s.data == DEMO and not os.path.exists(DEMO):
            print("making the demo's videos in data/demo", flush=True)
            cmaev.make_demo(Path(DEMO).parent)
    if s.batch_size % (world * s.repeats) or s.batch_size < 2:
        raise cmaev.CMAEVError(f"--batch-size {s.batch_size}: give a multiple of {world} ranks x {s.repeats} repeats, "
                               "and at least 2")
    per_step = s.batch_size // s.repeats
    videos = [] if s.benchmark and not s.data else read_videos(s, per_step)
    held_out = cmaev.read_list(s.val) if s.val else []
    per_epoch = len(videos) // per_step
    steps, warmup = s.epochs * per_epoch, s.warmup_epochs * per_epoch

    # the model
    geometry = dict(frames=s.frames, size=s.size, tubelet=s.tubelet, patch=s.patch)
    if not s.fusion:
        geometry.update(fusion=False)  # an argument of ConvViT alone
    torch.manual_seed(s.seed)
    model = cmaev.CMAEV(s.encoder, s.contrast_weight, s.temperature, **geometry)
    views = lambda videos, **how: cmaev.PretrainClips(
        videos, model.encoder.grid, s.frames, s.rate, s.max_shift, s.size, s.mask_ratio, **how)
    run = Path(s.out)
    bad_log = run / "bad-videos.jsonl"
    clips = views(videos, repeats=s.repeats, seed=s.seed, two_views=bool(s.contrast_weight), log=bad_log)
    held_out = views(held_out, two_views=False, log=bad_log)  # the same clips and masks for every seed
    flops = cmaev.clip_flops(model, s.mask_ratio)
    model.to(device)
    optimizer = torch.optim.AdamW(cmaev.decay_groups(model, s.weight_decay), betas=(s.beta1, s.beta2), fused=True)
    dtype = cmaev.amp_dtype(s.amp, device)
    autocast = lambda: torch.autocast(device.type, dtype) if dtype else nullcontext()
    guard = cmaev.Guard(optimizer, dtype, device)
    sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64, device=device)  # since the last log line, and how many
    bad = torch.zeros((), dtype=torch.int64, device=device)  # clips of this rank that took a bad video's place

    trained = DistributedDataParallel(model) if world > 1 else model
    normalize, colors = cmaev.normalize, cmaev.COLOR_OPERATIONS
    if s.compile:
        trained, normalize = torch.compile(trained), torch.compile(normalize)
        colors = [torch.compile(operation, dynamic=True) for operation in colors]  # any number of clips
    workers = cmaev.worker_count(s.workers, device)
    load = lambda steps, start=0: cmaev.Feed(cmaev.loader(clips, workers, device, batch_sampler=cmaev.batches(
        len(videos), per_step, steps, s.seed, rank, world, start)), device)

    def train_step(batch, lr):
        online, target = normalize(batch["online"]), None
        if s.contrast_weight:
            target = batch["target"]
            if s.color_augment:
                target = cmaev.augment_colors(target, batch["colors"], colors)
            target = normalize(target)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast():
            losses = trained(online, target, batch["mask"])
        grad_norm, fine = guard.step(losses["loss"], model.parameters(), s.clip_grad)
        model.update_target(s.momentum)
        values = torch.stack([*(losses[name].detach() for name in LOSSES), torch.ones((), device=device)])
        sums.add_(values.where(fine, 0))
        return grad_norm

    if s.benchmark:
        count = s.batch_size // world
        pixels = lambda: torch.randint(256, (1, count, s.frames, 3, s.size, s.size), dtype=torch.uint8)
        synthetic = dict(online=pixels(), mask=cmaev.tube_mask(count, model.encoder.grid, s.mask_ratio)[None])
        if s.contrast_weight:
            synthetic.update(target=pixels(), colors=torch.stack([cmaev.draw_colors() for _ in range(count)])[None])
        if device.type == "cuda":
            synthetic = {name: x.pin_memory() for name, x in synthetic.items()}
        return benchmark(s, train_step, synthetic, load if videos else None, workers, flops, dtype, device, world, say)

    # the run's folder, and where it stopped
    start, bad_before = 0, 0
    with cmaev.chief_first():
        checkpoint = cmaev.open_run(run, s, FREE, device, videos)
    if checkpoint:
        cmaev.load_weights(model, checkpoint["model"], run / "checkpoint.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        guard.load_state_dict(checkpoint["guard"])
        sums.copy_(checkpoint["sums"])
        start, bad_before = checkpoint["step"], checkpoint["bad"]
    keep_result = lambda: s.results and chief and cmaev.add_result(
        s.results, cmaev.given(s, SETTINGS), cmaev.last_losses(run))
    if start == steps:
        keep_result()
        return say(f"{run} is finished, all {steps} steps: for another run, give another --out")
    if chief:
        cmaev.start_log(run / "log.jsonl", start)

    parameters = sum(p.numel() for p in model.encoder.parameters())
    say(f"{s.encoder}, {parameters / 1e6:.1f} M parameters; {len(videos)} videos, {steps} steps of {s.batch_size} "
        f"clips, {flops * s.batch_size * steps:.2g} floating-point operations; {world} x {device.type}, "
        f"{str(dtype or torch.float32).removeprefix('torch.')}" + (f"; going on from step {start}" if start else ""))

    # the loop
    stopped = cmaev.notice_signals()
    feed, scale = load(steps, start), s.batch_size / 256
    began, logged = time.perf_counter(), start
    for step in range(start, steps):
        lr = cmaev.learning_rate(step, warmup, steps, scale * s.warmup_lr, scale * s.lr, scale * s.min_lr)
        batch = next(feed)
        bad += batch["replaced"].sum()
        grad_norm = train_step(batch, lr)

        done, last, stop = step + 1, step + 1 == steps, stopped()
        log, save = done == 1 or done % s.log_every == 0 or last, done % s.save_every == 0 or last
        if log or save or stop:
            bad_clips = bad_before + int(cmaev.sum_over_ranks(bad.clone()))
            cmaev.check_bad_share(bad_clips, done * s.batch_size, per_epoch * s.batch_size, s.bad_share, bad_log)
            skipped = guard.check(run)  # waits for the device
        if log:
            *means, _ = (cmaev.mean_over_ranks(sums) / sums[-1].clamp(min=1)).tolist()
            seconds, clips_done = time.perf_counter() - began, (done - logged) * s.batch_size
            record = dict(step=done, epoch=done / per_epoch, **dict(zip(LOSSES, means)), lr=lr,
                          grad_norm=grad_norm.item(), clips_per_s=clips_done / seconds,
                          step_ms=1000 * seconds / (done - logged), data_wait=feed.waited() / seconds,
                          tflop_per_s=flops * clips_done / seconds / 1e12, memory_mib=cmaev.peak_memory(device),
                          bad_clips=bad_clips, skipped_steps=skipped)
            if chief:
                cmaev.add_line(run / "log.jsonl", record)
                left = timedelta(seconds=round(seconds / (done - logged) * (steps - done)))
                print("step {step}/{steps}  epoch {epoch:.2f}  loss {loss:.4f} = {reconstruction:.4f} + {weight} x "
                      "{contrast:.4f}  accuracy {accuracy:.0%}  lr {lr:.1e}  grad {grad_norm:.2f}  {clips_per_s:.1f} "
                      "clips/s  data wait {data_wait:.0%}  {tflop_per_s:.3g} TFLOP/s  {memory_mib:.0f} MiB  {left} "
                      "left".format(
                          steps=steps, weight=s.contrast_weight, left=left, **record),
                      flush=True)
            if done == 1:
                say(f"the first step took {seconds:.1f} s{', compiling included' if s.compile else ''}", flush=True)
            sums.zero_()
            began, logged = time.perf_counter(), done

        if chief and s.picture_every and (done % s.picture_every == 0 or last):
            write_png(picture(model, clips, device), str(run / f"reconstruction-{done:06d}.png"))
        if save and s.val:
            with autocast():
                loss = cmaev.held_out_reconstruction(model, held_out, s.batch_size // world, workers, device)
            say(f"step {done}/{steps}  reconstruction of {len(held_out)} held-out videos {loss:.4f}", flush=True)
            if chief:
                cmaev.add_line(run / "log.jsonl", dict(step=done, held_out_reconstruction=loss))
        if save or stop:
            cmaev.mean_over_ranks(sums)
            if chief:
                cmaev.save_encoder(model.encoder, run / "encoder.pt")
                with cmaev.whole_file(run / "checkpoint.pt", "wb") as file:
                    torch.save(dict(step=done, model=model.state_dict(), optimizer=optimizer.state_dict(),
                                    guard=guard.state_dict(), sums=sums, bad=bad_clips), file)
        if stop and not last:
            cmaev.stop_run(stop, done)

    keep_result()
    say(f"finished: {run} holds log.jsonl, checkpoint.pt, encoder.pt and the pictures; {bad_clips} of "
        f"{steps * s.batch_size} clips were of bad videos, {skipped} of {steps} steps were left out")


def read_videos(s, per_step):
    """--data and --subset -> read_list's videos. Raises CMAEVError where they do not fill a step."""
    if not s.data:
        raise cmaev.CMAEVError(f"the recipe {s.recipe} needs --data: a list (`path label` a line) or class folders")
    videos = cmaev.read_list(s.data)
    if s.subset:
        with cmaev.seeded(s.seed):
            videos = [videos[i] for i in torch.randperm(len(videos))[:s.subset]]
    if len(videos) < per_step:
        raise cmaev.CMAEVError(f"--batch-size {s.batch_size}: give no more than the {len(videos) * s.repeats} clips "
                               f"that the {len(videos)} videos of {s.data} give")
    cmaev.check_readable(videos)
    return videos


def benchmark(s, train_step, synthetic, load, workers, flops, dtype, device, world, say):
    """Times the training step on one synthetic batch and on --data, and the reading of --data alone: a table, JSON."""
    timed, rows = 20, {}
    warm = 5 + 2 * workers  # compilation, memory, and the batches that were read ahead meanwhile
    peak = cmaev.matrix_rate(device, dtype)

    def run(name, feed, step, count):
        if device.type == "cuda":
            torch.cuda.synchronize()
        feed.waited()
        began = time.perf_counter()
        for _ in range(count):
            step(next(feed), 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rate = count * s.batch_size / seconds
        rows[name] = dict(clips_per_s=rate, step_ms=1000 * seconds / count)
        if step is train_step:
            rows[name].update(tflop_per_s=flops * rate / world / 1e12, data_wait=feed.waited() / seconds,
                              memory_mib=cmaev.peak_memory(device))

    feeds = [("synthetic", cmaev.Feed(repeat(synthetic), device), train_step)]
    if load:
        data = load(2 * (warm + timed))
        feeds += [("data", data, train_step), ("reading", data, lambda batch, lr: None)]
    for name, *how in feeds:
        run(name, *how, warm)
        run(name, *how, timed)

    say(f"{s.encoder}, {s.frames} x {s.size} x {s.size}, batch {s.batch_size}, {dtype or torch.float32}, "
        f"{'compiled' if s.compile else 'not compiled'}, {world} x {device.type}; a rank's matrix products: "
        f"{peak:.3g} TFLOP/s")
    for name, row in rows.items():
        say("{name:<10}{clips_per_s:9.1f} clips/s {step_ms:9.1f} ms a step".format(name=name, **row)
            + ("" if name == "reading" else "{tflop_per_s:9.3g} TFLOP/s a rank = {share:.0%} {memory_mib:9.0f} MiB"
               "   data wait {data_wait:.0%}".format(share=row["tflop_per_s"] / peak, **row)))
    if load and workers:
        cores = rows["synthetic"]["clips_per_s"] / rows["reading"]["clips_per_s"] * workers
        say(f"to read as fast as it trains on synthetic clips, a rank needs {cores:.1f} decoding processes")
    say(json.dumps(dict(settings=vars(s), device=cmaev.device_name(device), world_size=world, torch=torch.__version__,
                        matrix_tflop_per_s=peak, **rows)))


def picture(model, clips, device, count=3, columns=8):
    """Original, masked and reconstructed frames of the first videos, a row each -> uint8 [3, H, W]."""
    samples = [clips[0, index] for index in range(min(count, len(clips)))]
    online = cmaev.normalize(torch.stack([sample["online"][0] for sample in samples]).to(device))
    rows = model.reconstruct(online, torch.stack([sample["mask"][0] for sample in samples]))
    frames = torch.stack(rows, dim=1).transpose(2, 3)[:, :, ::-(-online.shape[2] // columns)]  # [clip, row, T, 3, H, W]
    return (make_grid(frames.flatten(0, 2), nrow=frames.shape[2]) * 255).round().byte().cpu()


if __name__ == "__main__":
    cmaev.run_script(main)
