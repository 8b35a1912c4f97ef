"""Fine-tunes, tests, probes and asks an action recogniser on top of a pre-trained encoder.

    python finetune.py                                                   the demo, from the run of `python pretrain.py`
    python finetune.py --probe linear                                    frozen features; or --probe knn
    python finetune.py --eval --segments 5 --crops 3                     tests what was fine-tuned
    python finetune.py --predict clip.mp4                                its five best classes
    torchrun --nproc_per_node=8 finetune.py --recipe k400 --data train.txt --val val.txt --init encoder.pt

The same command run again goes on from the last checkpoint. `python finetune.py --help` lists the settings.
"""

import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import cmaev  # before torch: it says how OpenMP's threads wait

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

# One value, or one a recipe: demo, K400, SSv2. Where they come from: README, "Settings".
SETTINGS = {
    "data": (("data/demo/train.txt", "", ""), "to train on: list file (`path label` a line) or class folders"),
    "val": (("data/demo/val.txt", "", ""), "the same, to test on; without it a tenth of --data is held out"),
    "out": (("runs/finetune-demo", "runs/finetune-k400", "runs/finetune-ssv2"), "the run's folder"),
    "init": (("runs/pretrain-demo", "runs/pretrain-k400", "runs/pretrain-ssv2"),
             "weights: a run of pretrain.py, a file of this project, VideoMAE or Hugging Face, or none"),
    "subset": (0, "only the first N videos of a seeded shuffle of the training list; 0: all"),
    # what to do
    "probe": ("", "instead of fine-tuning: linear or knn, on frozen features"),
    "eval": (False, "only test the checkpoint in --out, with the settings of its run; writes to out/eval"),
    "predict": ([], "only print the five best classes of these videos by the checkpoint in --out (-- -x.mp4)"),
    # the model
    "encoder": (("vit_tiny", "vit_base", "vit_base"), ", ".join(cmaev.ENCODERS)),
    "frames": ((8, 16, 16), "frames a clip"),
    "size": ((48, 224, 224), "height and width of a clip, pixels"),
    "tubelet": (2, "frames a token"),
    "patch": ((8, 16, 16), "height and width of a token, pixels"),
    # the clips
    "sampling": (("dense", "dense", "uniform"), "dense: every rate-th frame; uniform: one frame from each segment"),
    "rate": ((4, 4, 2), "sampling rate r of dense sampling"),
    "bad-share": (0.05, "largest share of clips whose video cannot be read; another video takes its place"),
    "repeats": ((1, 2, 2), "clips out of each opened video: a step has batch-size times so many clips"),
    "smallest-crop": ((0.5, 0.08, 0.08), "smallest area of a random crop, as a share of the frame"),
    "flip": ((False, True, False), "horizontal flips; SSv2 has left and right as labels"),
    "rand-augment": ((False, True, True), "RandAugment, four operations of strength 7"),
    "erasing": ((0.0, 0.25, 0.25), "probability of random erasing"),
    "mixup": ((0.0, 0.8, 0.8), "alpha; 0: none"),
    "cutmix": ((0.0, 1.0, 1.0), "alpha; 0: none; with mixup, one of the two a step"),
    "segments": ((1, 5, 2), "test clips a video, over time"),
    "crops": ((1, 3, 3), "test crops a clip, over space"),
    # optimisation
    "epochs": ((20, 75, 50), "passes over the videos"),
    "warmup-epochs": ((2, 5, 5), "epochs of linear warm-up"),
    "batch-size": ((16, 384, 512), "videos a step, over all ranks; the learning-rate rule goes by it, without repeats"),
    "lr": ((1.6e-2, 5e-4, 5e-4), "base learning rate, times batch size / 256"),
    "warmup-lr": (1e-6, "where the warm-up starts, times batch size / 256"),
    "min-lr": (1e-6, "where the cosine ends, times batch size / 256"),
    "layer-decay": (0.75, "factor of the learning rate from each layer to the one before it"),
    "beta1": (0.9, "AdamW"),
    "beta2": (0.999, "AdamW"),
    "weight-decay": (0.05, "AdamW; not on biases and norms"),
    "drop-path": (0.1, "rate at which a clip skips a residual branch, growing linearly up to this in the last block"),
    "smoothing": (0.1, "label smoothing"),
    "clip-grad": (0.0, "largest gradient norm; 0: unlimited"),
    "seed": (0, "of the head, the order and the samples"),
    "amp": ("auto", "auto, bf16, fp16 or none (float32); auto: what the device is fast at"),
    # the machine and the output: free to change between two starts of a run
    "compile": (False, "torch.compile"),
    "workers": (-1, "decoding processes a rank; -1: one a core beside a GPU, at most 16, and 2 on a CPU; 0: none"),
    "log-every": ((25, 20, 20), "steps a log line"),
    "save-every": ((100, 1000, 1000), "steps a checkpoint"),
    "results": ("", "file that a test or probe adds a line of JSON to, once: its flags, its accuracy"),
}
FREE = cmaev.MACHINE | {"bad_share", "eval", "predict", "segments", "crops", "val"}


def main():
    s, by_hand = cmaev.read_settings(SETTINGS, __doc__.splitlines()[0])
    if s.predict or s.eval:
        cmaev.settings_of_run(s.out, s, by_hand)
    else:
        cmaev.check_own_data(by_hand)
    rank, world, device = cmaev.join_ranks()
    chief = rank == 0
    say = print if chief else lambda *_, **__: None
    run, dtype, flags = Path(s.out), cmaev.amp_dtype(s.amp, device), cmaev.given(s, SETTINGS)
    if s.results and cmaev.has_result(s.results, flags):
        return say(f"{s.results} has the line of these flags: nothing to do")
    keep_result = lambda measured: s.results and chief and cmaev.add_result(s.results, flags, measured)
    autocast = lambda: torch.autocast(device.type, dtype) if dtype else nullcontext()
    workers = cmaev.worker_count(s.workers, device)
    geometry = dict(frames=s.frames, size=s.size, tubelet=s.tubelet, patch=s.patch)
    views = lambda videos, segments=s.segments, crops=s.crops: cmaev.LabelledClips(
        videos, s.frames, s.rate, s.size, s.sampling, segments=segments, crops=crops)
    softmax = lambda model: lambda clips: model(clips).float().softmax(dim=1)
    over_videos = lambda function, clips: cmaev.over_videos(
        function, clips, max(1, s.batch_size // (world * s.segments * s.crops)), workers, device)

    def build(names, init):
        sizes = dict(fusion=False) if s.encoder.startswith("convvit") else {}  # ConvMAE's fine-tuning leaves it out
        encoder = cmaev.build_encoder(s.encoder, **geometry, **sizes, drop_path=s.drop_path)
        if init:
            cmaev.load_encoder(init, encoder)
        return cmaev.Classifier(encoder, len(names)).to(device)

    def test(model, videos, names, folder):
        model.eval()
        with autocast():
            scores = over_videos(softmax(model), views(videos))
        if chief:
            top1, top5 = cmaev.report(scores, videos, names, folder)
            keep_result(dict(top1=round(top1, 2), top5=round(top5, 2), videos=len(videos)))
            print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(videos)} videos, {s.segments} x {s.crops} views, "
                  f"{len(names)} classes (chance {100 / len(names):.2f} %); {folder} holds predictions.csv")

    def labelled_videos():
        videos = cmaev.read_labelled(s.data, "data")
        if s.val:
            return videos, None
        videos, tests = cmaev.hold_out(videos, s.seed)
        if not tests:
            raise cmaev.CMAEVError(f"{s.data} has one video per class: give --val, videos to test on")
        say(f"no --val: {len(tests)} of the {len(videos) + len(tests)} videos of {s.data}, a tenth of each class drawn "
            f"by --seed {s.seed}, are held out to test on")
        return videos, tests

    # asking and testing what is there
    if s.predict or s.eval:
        checkpoint = cmaev.read_checkpoint(run / "checkpoint.pt")
        if checkpoint is None or "names" not in checkpoint:
            raise cmaev.CMAEVError(f"{run} holds no checkpoint of finetune.py: fine-tune first, or give another --out")
        names = checkpoint["names"]
        model = build(names, None)
        cmaev.load_weights(model, checkpoint["model"], run / "checkpoint.pt")
        if s.eval:
            tests = checkpoint.get("held_out")
            if s.val:
                tests = cmaev.read_test_videos(s.val, names, checkpoint.get("class_folders", False))
            return test(model, tests, names, run / "eval")
        model.eval()
        with autocast():
            scores = over_videos(softmax(model), views([(file, None) for file in s.predict]))
        for file, probabilities in zip(s.predict, scores):
            if probabilities.isnan().any():
                continue
            best = probabilities.topk(min(5, len(names)))
            say(f"{file}: " + ", ".join(f"{names[i]} {p:.1%}" for p, i in zip(best.values, best.indices)))
        if scores.isnan().any():
            raise cmaev.CMAEVError("not all of these files could be read")
        return

    # the videos
    videos, tests = labelled_videos()
    names = cmaev.class_names(videos + (tests or []), s.data)
    held_out, class_folders = tests, os.path.isdir(s.data)
    tests = tests or cmaev.read_test_videos(s.val, names, class_folders)
    if s.subset:
        with cmaev.seeded(s.seed):
            videos = [videos[i] for i in torch.randperm(len(videos))[:s.subset]]
    if not s.probe and (s.batch_size % world or len(videos) < s.batch_size):
        raise cmaev.CMAEVError(f"--batch-size {s.batch_size}: needs a multiple of {world} ranks, and no more than the "
                               f"{len(videos)} videos of {s.data}")
    cmaev.check_readable(videos)
    cmaev.check_readable(tests)
    init = None if s.init == "none" else s.init
    torch.manual_seed(s.seed)

    # frozen features
    if s.probe:
        probes = dict(linear=cmaev.linear_probe, knn=cmaev.nearest_neighbours)
        if s.probe not in probes:
            raise cmaev.CMAEVError(f"--probe {s.probe}: give linear or knn")
        if s.encoder.startswith("convvit") and init and "fusion1.weight" not in cmaev.read_weights(init):
            geometry.update(fusion=False)
        encoder = cmaev.build_encoder(s.encoder, **geometry)
        if init:
            cmaev.load_encoder(init, encoder)
        encoder.to(device).eval()
        pooled = lambda clips: cmaev.features(encoder, clips)[1]
        with autocast():
            known, unknown = over_videos(pooled, views(videos)), over_videos(pooled, views(tests))
        labels, read = torch.tensor([label for _, label in videos]), ~known.isnan().any(dim=1)
        scores = probes[s.probe](known[read], labels[read], unknown.nan_to_num(), len(names))
        right = scores.argmax(dim=1) == torch.tensor([label for _, label in tests])
        top1 = 100 * float((right & ~unknown.isnan().any(dim=1)).float().mean())
        keep_result(dict(top1=round(top1, 2), labels=len(videos), videos=len(tests)))
        return say(f"{s.probe} probe of {s.init}: top-1 {top1:.2f} % of {len(tests)} videos, {len(videos)} labels "
                   f"(chance {100 / len(names):.2f} %)")

    # the model
    if s.batch_size // world < 2 and (s.mixup or s.cutmix):
        raise cmaev.CMAEVError(f"--batch-size {s.batch_size}: --mixup and --cutmix need two or more videos per rank")
    model = build(names, init)
    groups = cmaev.layer_groups(model, s.weight_decay, s.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True)
    guard = cmaev.Guard(optimizer, dtype, device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # the loss since the last log line, and how many
    augment = cmaev.training_augmentation(s.size, s.smallest_crop, s.flip, s.rand_augment, s.erasing)
    bad_log, bad = run / "bad-videos.jsonl", torch.zeros((), dtype=torch.int64, device=device)
    clips = cmaev.LabelledClips(videos, s.frames, s.rate, s.size, s.sampling, augment, s.repeats, seed=s.seed,
                                log=bad_log)
    mix = cmaev.mixing(s.mixup, s.cutmix, len(names))
    per_epoch = len(videos) // s.batch_size
    steps, warmup = s.epochs * per_epoch, s.warmup_epochs * per_epoch

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
    if chief:
        cmaev.start_log(run / "log.jsonl", start)
    bad_clips, per_step = bad_before, s.batch_size * s.repeats
    if start == steps and not s.results:
        return say(f"{run} is finished, all {steps} steps: --eval tests it; for another run, give another --out")
    say(f"{s.encoder} from {s.init}; {len(videos)} videos of {len(names)} classes, {steps} steps of "
        f"{s.batch_size * s.repeats} clips; {world} x {device.type}, "
        f"{str(dtype or torch.float32).removeprefix('torch.')}" + (f"; going on from step {start}" if start else ""))

    # the loop
    trained = DistributedDataParallel(model) if world > 1 else model
    if s.compile:
        trained = torch.compile(trained)
    feed = cmaev.Feed(cmaev.loader(clips, workers, device, batch_sampler=cmaev.batches(
        len(videos), s.batch_size, steps, s.seed, rank, world, start)), device)
    stopped = cmaev.notice_signals()
    scale = s.batch_size / 256
    began, logged = time.perf_counter(), start
    model.train()
    for step in range(start, steps):
        batch = next(feed)
        bad += batch["replaced"].sum()
        torch.manual_seed(cmaev.seed_of(s.seed, step, rank))  # of mixup and drop path: a restart changes nothing
        clip, labels = mix(cmaev.normalize(batch["clip"]), batch["label"])

        lr = cmaev.learning_rate(step, warmup, steps, scale * s.warmup_lr, scale * s.lr, scale * s.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        with autocast():
            logits = trained(clip)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=s.smoothing)
        grad_norm, fine = guard.step(loss, model.parameters(), s.clip_grad)
        sums += torch.stack([loss.detach(), torch.ones((), device=device)]).where(fine, 0)

        done, last, stop = step + 1, step + 1 == steps, stopped()
        log, save = done == 1 or done % s.log_every == 0 or last, done % s.save_every == 0 or last
        if log or save or stop:
            bad_clips = bad_before + int(cmaev.sum_over_ranks(bad.clone()))
            cmaev.check_bad_share(bad_clips, done * per_step, per_epoch * per_step, s.bad_share, bad_log)
            skipped = guard.check(run)  # waits for the device
        if log:
            mean = (cmaev.mean_over_ranks(sums)[0] / sums[1].clamp(min=1)).item()
            seconds, clips_done = time.perf_counter() - began, (done - logged) * s.batch_size * s.repeats
            record = dict(step=done, epoch=done / per_epoch, loss=mean, lr=lr, grad_norm=grad_norm.item(),
                          clips_per_s=clips_done / seconds, data_wait=feed.waited() / seconds,
                          memory_mib=cmaev.peak_memory(device), bad_clips=bad_clips, skipped_steps=skipped)
            if chief:
                cmaev.add_line(run / "log.jsonl", record)
                left = timedelta(seconds=round(seconds / (done - logged) * (steps - done)))
                print("step {step}/{steps}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.1e}  grad {grad_norm:.2f}  "
                      "{clips_per_s:.1f} clips/s  data wait {data_wait:.0%}  {memory_mib:.0f} MiB  {left} left".format(
                          steps=steps, left=left, **record), flush=True)
            if done == 1:
                say(f"the first step took {seconds:.1f} s{', compiling included' if s.compile else ''}", flush=True)
            sums.zero_()
            began, logged = time.perf_counter(), done
        if save or stop:
            cmaev.mean_over_ranks(sums)
            if chief:
                with cmaev.whole_file(run / "checkpoint.pt", "wb") as file:
                    torch.save(dict(step=done, model=model.state_dict(), optimizer=optimizer.state_dict(),
                                    guard=guard.state_dict(), sums=sums, bad=bad_clips, names=names, held_out=held_out,
                                    class_folders=class_folders), file)
        if stop and not last:
            cmaev.stop_run(stop, done)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    say(f"{bad_clips} of {steps * per_step} clips were of bad videos")
    test(model, tests, names, run)


if __name__ == "__main__":
    cmaev.run_script(main)
