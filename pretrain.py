"""Pre-trains CMAE-V on video files: one loop for a laptop's CPU, one GPU, and torchrun over many nodes.

    python pretrain.py                                                   the demo, which makes its own videos
    python pretrain.py --recipe k400 --data train.txt --micro-batch 64   one GPU
    torchrun --standalone --nproc_per_node=8 pretrain.py --recipe k400 --data train.txt

The same command run again continues from the last checkpoint. --help lists the settings of a recipe.
"""

import argparse
import math
import os
import sys
import time
from collections import deque
from pathlib import Path

import cmaev  # before torch: it sets how OpenMP's threads wait
from tools import demo_videos

import torch
from torchvision.utils import save_image

DEMO = "data/demo/train.txt"
METRICS = ("loss", "reconstruction", "contrast", "accuracy")

# What differs from the flags' defaults, which are the paper's for K400 (README, "Where the paper is silent")
RECIPES = {
    "demo": dict(data=DEMO, out="runs/pretrain-demo", encoder="vit_tiny", frames=8, size=56, patch=8,
                 mask_ratio=0.8, momentum=0.99, epochs=45, warmup_epochs=2, batch_size=16, lr=5e-3,
                 log_every=50, save_every=250, picture_every=250),
    "small": dict(out="runs/pretrain-small", encoder="vit_small", size=112, patch=8, epochs=200,
                  warmup_epochs=20, batch_size=256, micro_batch=64),
    "k400": dict(out="runs/pretrain-k400"),
    "ssv2": dict(out="runs/pretrain-ssv2", rate=2, max_shift=4),
}
FREE = {"compile", "workers", "micro_batch", "log_every", "save_every", "picture_every", "val",
        "bad_share", "out", "overridden"}  # may change when a run continues


def add_shared_settings(parser):
    """The settings that finetune.py has too. The defaults are those of pre-training."""
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("videos").add_argument
    add("--data", default="", help="list file (`path label` per line) or folder of class folders")
    add("--val", default="", help="the same: videos to log L_r of, or to evaluate fine-tuning on")
    add("--out", help="the run's folder")
    add("--subset", type=cmaev.WHOLE, default=0, help="only the first N videos of a seeded shuffle; 0: all")
    add("--bad-share", type=cmaev.SHARE, default=0.05, help="stop if more clips are of bad videos")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", default="vit_base", help=", ".join(cmaev.ENCODERS))
    add("--fusion", action=on_off, default=True, help="ConvViT: multi-scale fusion")
    add("--frames", type=cmaev.COUNT, default=16, help="frames per clip")
    add("--size", type=cmaev.COUNT, default=224, help="height and width of a clip in pixels")
    add("--tubelet", type=cmaev.COUNT, default=2, help="frames per token")
    add("--patch", type=cmaev.COUNT, default=16, help="height and width of a token in pixels")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cmaev.COUNT, default=800, help="passes over the videos")
    add("--warmup-epochs", type=cmaev.WHOLE, default=40, help="epochs of linear warm-up")
    add("--batch-size", type=cmaev.COUNT, default=2048, help="clips (fine-tuning: videos) per step, all ranks")
    add("--micro-batch", type=cmaev.WHOLE, default=0, help="of these per rank at a time, to save memory; 0: all")
    add("--lr", type=cmaev.POSITIVE, default=1.5e-4, help="learning rate, times batch size / 256")
    add("--warmup-lr", type=cmaev.NOT_NEGATIVE, default=1e-6, help="start of the warm-up, likewise")
    add("--min-lr", type=cmaev.NOT_NEGATIVE, default=1e-5, help="end of the cosine, likewise")
    add("--beta1", type=cmaev.BELOW_ONE, default=0.9, help="AdamW")
    add("--beta2", type=cmaev.BELOW_ONE, default=0.95, help="AdamW")
    add("--weight-decay", type=cmaev.NOT_NEGATIVE, default=0.05, help="AdamW; not on biases and norms")
    add("--clip-grad", type=cmaev.NOT_NEGATIVE, default=0.0, help="largest gradient norm; 0: unlimited")
    add("--seed", type=cmaev.number(int, f"[0, {2**64})"), default=0, help="of weights, order, samples")

    add = parser.add_argument_group("machine and output").add_argument
    add("--amp", choices=["auto", "bf16", "fp16", "none"], default="auto",
        help="auto: bf16 if the device is fast at it, else fp16 (GPU) or none (CPU)")
    add("--compile", action=on_off, default=False, help="torch.compile")
    add("--workers", type=cmaev.WHOLE, help="decoding processes per rank; GPU: a core each, at most 16; CPU: 2")
    add("--log-every", type=cmaev.COUNT, default=20, help="steps per log line")
    add("--save-every", type=cmaev.COUNT, default=1000, help="steps per checkpoint, at log lines")


def read_settings():
    parser = cmaev.argument_parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--init", default="none", help="weights to start from: a run, or a file, also VideoMAE's")
    add("--repeats", type=cmaev.COUNT, default=1, help="clips per opened video; multiplies steps")
    add("--rate", type=cmaev.COUNT, default=4, help="sampling rate r: every r-th frame")
    add("--max-shift", type=cmaev.WHOLE, default=8, help="p: the target view starts 0 to p frames later")
    add("--mask-ratio", type=cmaev.number(float, "(0, 1)"), default=0.9, help="share of masked tubes")
    add("--contrast-weight", type=cmaev.NOT_NEGATIVE, default=0.14, help="lambda_c; 0: no target branch")
    add("--temperature", type=cmaev.POSITIVE, default=0.07, help="tau of InfoNCE")
    add("--momentum", type=cmaev.SHARE, default=0.996, help="EMA momentum of the target encoder")
    add("--color-augment", action=argparse.BooleanOptionalAction, default=True, help="of the target view")

    add = parser.add_argument_group("pictures of reconstructions").add_argument
    add("--picture-every", type=cmaev.WHOLE, default=1000, help="steps per picture; 0: none")
    add_shared_settings(parser)
    return cmaev.parse_settings(parser, RECIPES, sys.argv[1:])


def read_videos(s):
    """The training videos, read_list's; makes the demo's. Raises CMAEVError where they do not fill a step."""
    if s.data == DEMO and not os.path.exists(DEMO) and cmaev.this_rank() == 0:
        cmaev.print0("making the demo's videos in data/demo: less than a minute on two cores")
        demo_videos.make_demo(Path(DEMO).parent)
    cmaev.objects_of_ranks(None)  # the other ranks wait for the videos
    if s.batch_size < 2:
        raise cmaev.CMAEVError(f"--batch-size {s.batch_size}: give at least 2")
    cmaev.count_micro_batches(s, s.repeats)  # checks --batch-size
    if not s.data:
        raise cmaev.CMAEVError(f"the recipe {s.recipe} needs --data: a list (`path label` per line) or class "
                               "folders")
    videos = cmaev.subset(cmaev.read_list(s.data), s.subset, s.seed)
    if len(videos) * s.repeats < s.batch_size:
        raise cmaev.CMAEVError(f"{cmaev.flag(s, 'batch_size')}: give no more than the "
                               f"{len(videos) * s.repeats} clips that the {len(videos)} videos of {s.data} give")
    cmaev.check_readable(videos)
    return videos


def build(s, device):
    """Settings -> model, optimizer, scaler, and train_step(feed) -> losses, gradient norm, replaced clips."""
    torch.manual_seed(s.seed)
    model = cmaev.CMAEV(s.encoder, s.contrast_weight, s.temperature, fusion=s.fusion, frames=s.frames,
                        size=s.size, tubelet=s.tubelet, patch=s.patch)
    if s.init != "none":
        cmaev.load_encoder(s.init, model.encoder, model.decoder)
        model.update_target(0.0)  # a copy
    model.to(device)
    groups = cmaev.decay_groups(model, s.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True)
    dtype = cmaev.amp_dtype(s.amp, device)
    scaler = cmaev.grad_scaler(dtype, device)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)
    num_micro_batches = cmaev.count_micro_batches(s, s.repeats)
    compiled = torch.compile if s.compile else lambda function: function
    parallel = compiled(cmaev.data_parallel(model))
    normalize, augment_colors = compiled(cmaev.normalize), compiled(cmaev.augment_colors)

    def model_inputs(batch):
        """The feed's dict of uint8 clips -> the model's arguments. It may have no target (see CMAEV)."""
        online, target = normalize(batch["online"]), batch.get("target")
        if target is not None:
            target = normalize(augment_colors(target, batch["colors"]) if s.color_augment else target)
        return online, target, batch["mask"], batch.get("video_index")

    def train_step(feed):
        if num_micro_batches == 1:
            batch = next(feed)
            replaced = batch["replaced"].sum()
            inputs = model_inputs(batch)  # in float32: outside autocast
            with autocast():
                losses = parallel(*inputs)
            scaler.scale(losses["loss"]).backward()
        else:
            losses, replaced = backward_in_micro_batches(feed)
        grad_norm = cmaev.optimizer_step(model.parameters(), optimizer, scaler, dtype, s.clip_grad)
        model.update_target(s.momentum)
        return losses, grad_norm, replaced

    def backward_in_micro_batches(feed):
        """Backward pass in micro-batches, with exactly the whole batch's gradient -> losses, replaced clips.

        Gradient accumulation gives another gradient: InfoNCE and the heads' batch norm couple all clips. But
        L_c sees the encoder only through the online features f of the clips. Let g be the gradient of
        lambda_c L_c with respect to f. Then <f, g> has the same gradient with respect to the encoder, and it is
        a sum over clips. The cost: the encoder runs twice on its visible tokens.
        """
        weight, replaced = s.contrast_weight, 0
        kept, parts = [], []
        for _ in range(num_micro_batches):  # 1. the features of all clips, without gradient
            batch = next(feed)
            replaced += batch["replaced"].sum()
            kept.append({name: batch[name] for name in ("online", "mask")})
            if weight:
                online, target, mask, video_index = model_inputs(batch)
                with autocast():
                    parts.append((*features(online, target, mask), video_index))

        if weight:  # 2. L_c of the whole batch, and g
            f, target_feature, video_index = (torch.cat(rows) for rows in zip(*parts))
            f = f.float().requires_grad_()
            with autocast():
                contrast, accuracy = model.contrastive_loss(f, target_feature, video_index)
                loss = scaler.scale(weight * contrast)
            g = torch.autograd.grad(loss, f)[0] / scaler.scale(torch.ones_like(loss))  # unscaled

        reconstruction = first = 0
        seen = []
        for batch in kept:  # 3. each micro-batch again, with gradient: its share of L_r, and <f, g>
            inputs = model_inputs(batch)
            end, last = first + len(batch["mask"]), batch is kept[-1]
            parallel.require_backward_grad_sync = last  # DDP averages the gradients then
            with autocast():
                losses = parallel(*inputs)
                loss = losses["reconstruction"] / num_micro_batches
                reconstruction = reconstruction + loss.detach()
                if weight and last:  # L_c itself: DDP wants the heads' gradient in the pass that it averages
                    whole = torch.cat([f.detach()[:first], losses["feature"].float()])
                    loss = loss + weight * model.contrastive_loss(whole, target_feature, video_index)[0]
                elif weight:
                    loss = loss + (losses["feature"] * g[first:end]).sum()
            scaler.scale(loss).backward()
            first = end
            seen.append(losses["feature"].detach())
        losses |= dict(loss=reconstruction, reconstruction=reconstruction, feature=torch.cat(seen))
        if weight:
            losses |= dict(contrast=contrast, accuracy=accuracy, loss=reconstruction + weight * contrast)
        return losses, replaced

    @compiled
    @torch.no_grad()
    def features(online, target, mask):
        """Equations 1 to 3 without gradient -> features [B, D] of the online and the target view."""
        visible, _ = cmaev.visible_and_masked(mask, online.device)
        return model.encoder(online, visible).mean(dim=1), model.target_encoder(target).mean(dim=1)
    return model, optimizer, scaler, train_step


def main():
    s = read_settings()
    device, run = cmaev.join_ranks(), Path(s.out)
    videos = read_videos(s)
    held_out_videos = cmaev.read_list(s.val) if s.val else []
    cmaev.check_ranks(s, device, videos, held_out_videos)
    model, optimizer, scaler, train_step = build(s, device)
    sampling = dict(grid=model.encoder.grid, frames=s.frames, rate=s.rate, max_shift=s.max_shift, size=s.size,
                    mask_ratio=s.mask_ratio, log=run / "bad-videos.jsonl")
    clips = cmaev.PretrainClips(videos, **sampling, repeats=s.repeats, seed=s.seed,
                                two_views=s.contrast_weight > 0)
    held_out = cmaev.PretrainClips(held_out_videos, **sampling, two_views=False)  # the same for every --seed
    per_epoch = len(videos) * s.repeats // s.batch_size
    steps = s.epochs * per_epoch

    cmaev.open_run(run, s, FREE, videos)
    meter = cmaev.Meter(METRICS, device)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    start = cmaev.resume(run, state)
    if start == steps:
        return cmaev.print0(f"{run} is finished, all {steps} steps: for another run, give another --out")
    parameters = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    precision = cmaev.amp_dtype(s.amp, device) or torch.float32
    cmaev.print0(f"{s.encoder}, {parameters:.1f} M parameters; {len(videos)} videos, {steps} steps of "
                 f"{s.batch_size} clips; {cmaev.world_size()} x {device.type}, {precision}"
                 + (f"; continuing from step {start}" if start else ""))
    cmaev.note_weak_settings(s, steps)
    tubes = math.prod(model.encoder.grid[1:])
    visible = tubes - int(s.mask_ratio * tubes)
    if visible < 10:
        cmaev.print0(f"warning: only {visible} of {tubes} tubes are visible (in the paper 20 of 196), a "
                     "harder task: give a smaller --patch, a larger --size or a lower --mask-ratio")

    def save_run(step):
        if cmaev.this_rank() == 0:
            cmaev.save_encoder(model.encoder, run / "encoder.pt")
        cmaev.save_checkpoint(run, step, state)

    received = cmaev.notice_signals()
    num_micro_batches = cmaev.count_micro_batches(s, s.repeats)
    order = cmaev.batches(len(videos), s.batch_size // s.repeats, steps, s.seed, start, num_micro_batches)
    feed = cmaev.Feed(cmaev.loader(clips, s.workers, device, batch_sampler=order), device)
    features = deque(maxlen=math.ceil(4096 / s.batch_size))  # of the last 4096 clips or so, over all ranks
    for step in range(start, steps):
        lr = cmaev.set_learning_rate(optimizer, s, step, per_epoch)
        losses, grad_norm, replaced = train_step(feed)
        meter.add([losses[name].detach() for name in METRICS], grad_norm, replaced)
        features.append(losses["feature"].detach())

        done = step + 1
        last = done == steps
        if done > 1 and done % s.log_every and not last:
            continue
        due = lambda every: every > 0 and (last or done // every > meter.step // every)  # before meter.read
        save, picture, stop = due(s.save_every), due(s.picture_every), received()
        record = meter.read(done, s.batch_size, per_epoch, s.bad_share)
        record |= dict(lr=lr, grad_norm=grad_norm.item(), data_wait=feed.waited() / record["seconds"],
                       effective_rank=effective_rank(cmaev.gather_over_ranks(torch.cat(list(features)))))
        features.clear()
        if stop:  # before the validation, as SLURM soon kills
            save_run(done)
        text = (f"loss {record['loss']:.4f} = {record['reconstruction']:.4f} + {s.contrast_weight} x "
                f"{record['contrast']:.4f}  accuracy {record['accuracy']:.0%}  "
                f"rank {record['effective_rank']:.1f}")
        if save and s.val:
            record["held_out_reconstruction"] = held_out_reconstruction(model, held_out, s, device)
            text += f"  held-out reconstruction {record['held_out_reconstruction']:.4f}"
        cmaev.write_log(run, record, steps, text)
        if picture and cmaev.this_rank() == 0:
            draw(model, clips, device, run / f"reconstruction-{done:06d}.png")
        if save and not stop:
            save_run(done)
        meter.began = time.perf_counter()  # pictures, validation and saving do not count as training
        if stop and not last:
            cmaev.stop_run(stop, done)
    cmaev.print0(f"finished: {run} holds log.jsonl, checkpoint.pt, encoder.pt and the pictures; "
                 f"{record['bad_clips']} of {steps * s.batch_size} clips were of bad videos, "
                 f"{record['skipped_steps']} of {steps} steps were skipped")


def effective_rank(features):
    """The effective number of directions of features [N, D]: 1 (collapsed) to min(N - 1, D).

    The exponential of the entropy of their covariance's normalised eigenvalues. Rows that are not finite are
    left out; NaN for fewer than two. Features that differ by less than 0.1 % of their length count as
    collapsed: rounding alone has many directions.
    """
    features = features[features.isfinite().all(dim=1)].double()
    if len(features) < 2:
        return math.nan
    eigenvalues = torch.linalg.eigvalsh(features.T.cov()).clamp(min=0)
    variance = eigenvalues.sum()
    if variance <= 1e-6 * features.square().sum(dim=1).mean():
        return 1.0
    return torch.special.entr(eigenvalues / variance).sum().exp().item()


@torch.no_grad()
def held_out_reconstruction(model, clips, s, device):
    """Mean reconstruction loss (equation 7) of held-out PretrainClips, each once, over all ranks."""
    total, dtype = torch.zeros(2, dtype=torch.float64, device=device), cmaev.amp_dtype(s.amp, device)
    batch = s.micro_batch or s.batch_size // cmaev.world_size()
    for sample in cmaev.loader(clips, s.workers, device, batch_size=batch, sampler=cmaev.rank_indices(clips)):
        clip = cmaev.normalize(sample["online"][:, 0].to(device, non_blocking=True))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(clip, None, sample["mask"][:, 0])["reconstruction"]
        total += torch.stack([loss * len(clip), loss.new_tensor(len(clip))])
    loss, count = cmaev.sum_over_ranks(total).tolist()
    return loss / count


def draw(model, clips, device, path, count=3, columns=8):
    """Draws the first videos: original, masked, mean colours, reconstructed. Enlarges small frames."""
    samples = [clips[0, index] for index in range(min(count, len(clips)))]
    online = cmaev.normalize(torch.stack([sample["online"][0] for sample in samples]).to(device))
    rows = model.reconstruct(online, torch.stack([sample["mask"][0] for sample in samples]))
    frames = torch.stack(rows, dim=1).transpose(2, 3)  # [clip, row, T, 3, H, W]
    frames = frames[:, :, ::math.ceil(frames.shape[2] / columns)]
    scale = max(1, 112 // online.shape[-1])
    enlarged = frames.flatten(0, 2).repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    save_image(enlarged, path, nrow=frames.shape[2])


if __name__ == "__main__":
    cmaev.run_script(main)
