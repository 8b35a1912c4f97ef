"""Fine-tunes a pre-trained encoder for action recognition; probes it; evaluates and applies the classifier.

    python finetune.py                                   the demo, from the run of `python pretrain.py`
    python finetune.py --init runs/mine --data mine --out runs/tuned    with the recipe and sizes of runs/mine
    python finetune.py --probe linear                    frozen features; or --probe knn
    python finetune.py --eval --segments 5 --crops 3     evaluates the run in --out
    python finetune.py --predict clip.mp4                the five best classes of a video
    python finetune.py --features out.npz --data list.txt --init encoder.pt
    torchrun --standalone --nproc_per_node=8 finetune.py --recipe k400 --data train.txt --val val.txt

The same command run again continues from the last checkpoint. --help lists the settings of a recipe.
"""

import argparse
import csv
import math
import os
import signal
import sys
import time
from pathlib import Path

import cmaev  # before torch: it sets how OpenMP's threads wait
from cmaev import CMAEVError, print0
from pretrain import add_shared_settings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

# What differs from the flags' defaults: the paper's and VideoMAE's for K400 and SSv2, ours for the demo
COMMON = dict(warmup_epochs=5, lr=5e-4, min_lr=1e-6, beta2=0.999)
RECIPES = {
    "demo": COMMON | dict(
        data="data/demo/train.txt", val="data/demo/val.txt", out="runs/finetune-demo",
        init="runs/pretrain-demo", encoder="vit_tiny", frames=8, size=56, patch=8, repeats=1,
        smallest_crop=0.5, flip=False, rand_augment=False, erasing=0.0, mixup=0.0, cutmix=0.0, segments=1,
        crops=1, epochs=20, warmup_epochs=2, batch_size=16, lr=1.6e-2, log_every=25, save_every=100),
    "small": COMMON | dict(out="runs/finetune-small", init="runs/pretrain-small", encoder="vit_small",
                           size=112, patch=8, epochs=75, batch_size=128, micro_batch=16),
    "k400": COMMON | dict(out="runs/finetune-k400", init="runs/pretrain-k400", epochs=75, batch_size=384),
    "ssv2": COMMON | dict(out="runs/finetune-ssv2", init="runs/pretrain-ssv2", sampling="uniform", flip=False,
                          segments=2, epochs=50, batch_size=512),
}
SIZES = {"encoder", "frames", "size", "tubelet", "patch", "fusion"}  # told by the weights of --init
MACHINE = {"compile", "workers", "log_every", "save_every"}
FREE = MACHINE | {"micro_batch", "bad_share", "segments", "crops", "val", "val_every", "eval", "predict",
                  "features", "best", "out", "overridden"}  # may change when a run continues


# Labelled videos --------------------------------------------------------------------------------------------

def read_labelled(path):
    """read_list -> [(path, class)]; a class is a label of the list, or the name of a class folder.

    Raises CMAEVError for a missing label.
    """
    videos = cmaev.read_list(path)
    for video, label in videos:
        if label is None or label < 0:
            what = "no label" if label is None else f"label {label}"
            raise CMAEVError(f"{path}: {video} has {what}: give 0, 1, 2, ..., or a folder per class")
    if os.path.isdir(path):
        return [(video, os.path.relpath(video, path).split(os.sep)[0]) for video, _ in videos]
    return videos


def class_names(videos, source="", file=""):
    """The classes of read_labelled(source)'s videos -> {class: name}, sorted.

    The names are the lines of `file` (--names), or the class folders; in a list the folders that hold the
    videos, if each class has its own, else the labels. Raises CMAEVError for a label without a line of its own.
    """
    folders = sorted({(label, Path(path).parent.name) for path, label in videos})
    names = dict(folders)
    if file and os.path.isdir(source):
        raise CMAEVError("--names is for lists: a folder's classes are its class folders")
    if file:
        last = max(names)
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")  # sig: skips a byte order mark
        lines = [line.strip() for line in text.rstrip().split("\n")]
        if len(set(lines) - {""}) < max(len(lines), last + 1) or {"\ufffd", "\0"} & set(text):
            raise CMAEVError(f"{file} has {len(lines)} lines: give each label, 0 to {last}, a name of its own, "
                             "one per line, in UTF-8")
        return dict(enumerate(lines))
    if os.path.isdir(source) or len(set(names.values())) < len(folders):
        return {label: str(label) for label in names}
    return names


def numbered(videos, classes, path):
    """Numbers the classes of read_labelled(path) -> [(path, its place in `classes`)]. Raises CMAEVError."""
    number = {label: i for i, label in enumerate(classes)}
    for video, label in videos:
        if label not in number:
            raise CMAEVError(f"{path}: {video} is of class {label}: training has {classes[0]} to {classes[-1]}")
    return [(video, number[label]) for video, label in videos]


def hold_out(videos, seed):
    """A seeded tenth of each class, at least one if it has two -> (videos to train on, videos to test on)."""
    order, tests = cmaev.subset(range(len(videos)), len(videos), seed), set()
    for label in {label for _, label in videos}:
        members = [i for i in order if videos[i][1] == label]
        tests.update(members[:max(round(len(members) / 10), int(len(members) > 1))])
    return [v for i, v in enumerate(videos) if i not in tests], [videos[i] for i in sorted(tests)]


def read_classes(s):
    """Reads --data, --val, --subset -> training videos, test videos, names, what settings.json stores."""
    labelled = read_labelled(s.data)
    names = class_names(labelled, s.data, s.names)
    classes, names = list(names), list(names.values())
    videos = numbered(labelled, classes, s.data)
    if s.val:
        tests = numbered(read_labelled(s.val), classes, s.val)
    else:
        videos, tests = hold_out(videos, s.seed)
        print0(f"no --val: {len(tests)} of the {len(labelled)} videos of {s.data}, a tenth of each class drawn "
               f"by --seed {s.seed}, are held out to test on")
    if not tests:
        raise CMAEVError(f"{s.data} has one video per class: give --val, videos to test on")
    videos = cmaev.subset(videos, s.subset, s.seed)
    cmaev.check_readable(videos)
    cmaev.check_readable(tests)
    return videos, tests, names, dict(names=names, classes=classes, held_out=[] if s.val else tests)


# Clips ------------------------------------------------------------------------------------------------------

def dense_indices(num_frames, frames, rate, starts):
    """Every rate-th frame from `starts` [clips] on. The last one of a shorter video repeats [VideoMAE]."""
    return (starts[:, None] + rate * torch.arange(frames)).clamp(max=num_frames - 1)


def uniform_indices(num_frames, frames, offsets):
    """One frame in each of `frames` equal parts [TSN], at `offsets` in [0, 1) of it, [clips, frames or 1]."""
    return ((torch.arange(frames) + offsets) * num_frames / frames).long().clamp(max=num_frames - 1)


def read_clips(video, indices):
    """Reads the frames `indices` [clips, T] of a Video, or of all its frames [n, H, W, 3] -> [clips, T, 3, H, W]."""
    frames = video[indices.flatten()] if torch.is_tensor(video) else video.read(indices.flatten())
    return frames.unflatten(0, indices.shape).movedim(-1, 2)


class TrainClips(cmaev.VideoClips):
    """Labelled clips for fine-tuning: `repeats` of each opened video [repeated sampling].

    Each has frames of its own [choice]; VideoMAE augments the same ones twice. `sampling`: "dense" (a stride
    of `rate`, K400) or "uniform" (one frame per part, SSv2). `augment`: uint8 [T, 3, H, W] -> [T, 3, S, S].
    dataset[epoch, index] -> clip uint8 [repeats, T, 3, S, S], label int64 [repeats], replaced (VideoClips).
    """

    def __init__(self, videos, frames, rate, sampling, augment, repeats=1, seed=0, log=None):
        super().__init__(videos, seed, log)
        self.frames, self.rate, self.sampling = frames, rate, sampling
        self.augment, self.repeats = augment, repeats

    def frame_indices(self, num_frames):
        """Draws the frames of each clip -> int64 [repeats, T]."""
        if self.sampling == "uniform":
            return uniform_indices(num_frames, self.frames, torch.rand(self.repeats, self.frames))
        last = max(num_frames - 1 - (self.frames - 1) * self.rate, 0)
        return dense_indices(num_frames, self.frames, self.rate, torch.randint(last + 1, (self.repeats,)))

    def sample(self, video, label, index, generator):
        clips = [self.augment(clip) for clip in read_clips(video, self.frame_indices(len(video)))]
        return dict(clip=torch.stack(clips), label=torch.full((len(clips),), label))


class TestViews(cmaev.VideoClips):
    """Test views: `segments` clips over time, `crops` crops of each along its long side.

    `sampling`: see TrainClips. dataset[0, index], V = segments * crops -> clip uint8 [V, T, 3, S, S];
    replaced, bool [V]: the video cannot be read, the clips are black.
    """

    attempts = 1

    def __init__(self, videos, frames, rate, size, sampling, segments=1, crops=1):
        super().__init__(videos)
        if sampling not in ("dense", "uniform"):
            raise CMAEVError(f"no sampling {sampling!r}: give 'dense' or 'uniform'")
        self.frames, self.rate, self.sampling = frames, rate, sampling
        self.size, self.segments, self.crops = size, segments, crops

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except cmaev.BadVideo:
            black = torch.zeros(self.segments * self.crops, self.frames, 3, self.size, self.size)
            return dict(clip=black.byte(), replaced=torch.ones(len(black), dtype=torch.bool))

    def frame_indices(self, num_frames):
        """Places the clips evenly [VideoMAE], a single one in the middle -> int64 [segments, T].

        Dense: from the first to the last start (VideoMAE's are multiples of the rate). Uniform: at 0,
        1 / segments, 2 / segments, ... of each part.
        """
        n = self.segments
        if self.sampling == "uniform":
            offsets = torch.arange(n) / n if n > 1 else torch.tensor([0.5])
            return uniform_indices(num_frames, self.frames, offsets[:, None])
        last = max(num_frames - 1 - (self.frames - 1) * self.rate, 0)
        starts = torch.arange(n) * last // (n - 1) if n > 1 else torch.tensor([(last + 1) // 2])
        return dense_indices(num_frames, self.frames, self.rate, starts)

    def sample(self, video, label=None, index=0, generator=None):
        views = []
        for clip in read_clips(video, self.frame_indices(len(video))):
            clip = v2.functional.resize(clip, [self.size], antialias=True)  # the short side
            axis = 2 if clip.shape[2] > clip.shape[3] else 3  # the long side
            room, n = clip.shape[axis] - self.size, self.crops
            starts = [k * room // (n - 1) for k in range(n)] if n > 1 else [room // 2]  # [VideoMAE]
            views += [clip.narrow(axis, start, self.size) for start in starts]
        return dict(clip=torch.stack(views))


def test_views(s, videos):
    """The test views of the settings."""
    return TestViews(videos, s.frames, s.rate, s.size, s.sampling, s.segments, s.crops)


def training_augmentation(size, smallest_crop, flip, rand_augment, erasing):
    """VideoMAE's augmentation by torchvision, one draw per clip: uint8 [T, 3, H, W] -> [T, 3, S, S].

    [choice] timm's rand-m7-n4-mstd0.5-inc1 skips each operation half of the time and varies its strength;
    torchvision applies all four at strength 7 of 10, posterises to 5 bits instead of 2, has Identity instead
    of Invert and SolarizeAdd. timm interpolates bicubically and erases with noise.
    """
    mean = [round(255 * m) for m in cmaev.MEAN]
    operations = v2.RandAugment(num_ops=4, magnitude=7, num_magnitude_bins=11, fill=mean,
                                interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([
        operations if rand_augment else nn.Identity(),
        v2.RandomResizedCrop(size, scale=(smallest_crop, 1), ratio=(3 / 4, 4 / 3), antialias=True),
        v2.RandomHorizontalFlip(0.5 if flip else 0.0),
        v2.RandomErasing(erasing, value=mean),
    ])


def mixing(mixup, cutmix, classes):
    """Mixup and cutmix with these alphas (0: without), one of the two and one lambda per micro-batch [timm].

    Returns a function: clips [B, 3, T, H, W], labels int64 [B] -> mixed clips, soft labels [B, classes].
    """
    chosen = [transform(alpha=alpha, num_classes=classes)
              for transform, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]

    def mix(clips, labels):
        if not chosen:
            return clips, labels
        images, labels = v2.RandomChoice(chosen)(clips.flatten(1, 2), labels)  # it takes [B, channels, H, W]
        return images.view_as(clips), labels
    return mix


# Classifier -------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """Mean of all tokens, LayerNorm, linear head [VideoMAE]: clip [B, 3, T, H, W] -> logits [B, classes].

    `fc_norm` replaces the encoder's final norm. `names`: of the classes; `views`: TestViews, for `predict`.
    """

    def __init__(self, encoder, names, views=None):
        super().__init__()
        self.encoder, self.names, self.views = encoder, names, views
        self.encoder.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = nn.Linear(encoder.width, len(names))
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)  # init_scale .001 [VideoMAE]
        nn.init.zeros_(self.head.bias)

    def forward(self, clip):
        return self.head(self.fc_norm(self.encoder(clip).mean(dim=1)))

    @torch.no_grad()
    def predict(self, video):
        """Classifies a video -> [(class name, probability)], the best first.

        `video`: a path, or all frames of a video, uint8 [n, H, W, 3], a tensor or an array. Raises BadVideo
        for a file that cannot be read, CMAEVError for other frames.
        """
        if isinstance(video, (str, os.PathLike)):
            sample = self.views.read_sample(video, None, 0)
        else:
            frames = torch.from_numpy(np.ascontiguousarray(video))  # torch takes no reversed channels
            if frames.dtype != torch.uint8 or frames.shape[3:] != (3,) or len(frames) == 0:
                raise CMAEVError(f"{frames.dtype} {list(frames.shape)}: give a path, or a video's frames, uint8 "
                                 "[n, H, W, 3]")
            sample = self.views.sample(frames)
        clips = sample["clip"].to(self.head.weight.device)
        scores = self(cmaev.normalize(clips)).softmax(dim=1).mean(dim=0)
        return [(self.names[i], float(scores[i])) for i in scores.argsort(descending=True).tolist()]


def build(s, names):
    """A run's settings and class names -> Classifier."""
    torch.manual_seed(s.seed)
    encoder = cmaev.build_encoder(s.encoder, fusion=False, frames=s.frames, size=s.size, tubelet=s.tubelet,
                                  patch=s.patch, drop_path=s.drop_path)  # without fusion, as ConvMAE
    return Classifier(encoder, names, test_views(s, []))


def read_record(run, best=False):
    """A run's settings.json and the path of its weights. Raises CMAEVError if it is no run of this script."""
    weights, path = Path(run) / ("best.pt" if best else "checkpoint.pt"), Path(run) / "settings.json"
    record = cmaev.parse_json(path.read_bytes(), path, "settings") if weights.exists() else {}
    if "names" not in record:
        raise CMAEVError(f"{run} holds no {weights.name} of finetune.py: fine-tune, or give another folder")
    return record, weights


def load(run, best=False, settings=None):
    """Loads the Classifier of a run of this script, on the CPU, in eval mode.

    `best`: from best.pt, not checkpoint.pt. `settings`: in place of the run's, for example with other views.
    """
    record, weights = read_record(run, best)
    model = build(settings or argparse.Namespace(**record["settings"]), record["names"])
    cmaev.load_weights(model, cmaev.load_tensors(weights)["model"], weights)
    return model.eval()


def layer_groups(model, weight_decay, layer_decay):
    """AdamW's groups of a Classifier [VideoMAE]: each layer's rate is `layer_decay` times the next one's.

    The classifier's own layers have scale 1; of the encoder's L layers (Encoder.layers), layer i has
    layer_decay^(L - i). A group carries its factor as "scale"; weight decay as in decay_groups.
    """
    layers = [*model.encoder.layers(), nn.ModuleList([model.fc_norm, model.head])]
    return [group | dict(scale=layer_decay ** (len(layers) - 1 - i))
            for i, layer in enumerate(layers) for group in cmaev.decay_groups(layer, weight_decay)]


# Scores -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def score_videos(function, views, s, device):
    """Applies function(clips [n, 3, T, H, W]) -> [n, C] to TestViews -> mean over each video's views [M, C].

    Rank r takes the videos r, r + world, ...: each video once. The row of a video that cannot be read is NaN.
    """
    rows, dtype = [], cmaev.amp_dtype(s.amp, device)
    per_rank = s.micro_batch or s.batch_size // cmaev.world_size()
    batch = max(1, per_rank // (views.segments * views.crops))
    batches = cmaev.loader(views, s.workers, device, batch_size=batch, sampler=cmaev.rank_indices(views))
    for done, sample in enumerate(batches):
        if done % 100 == 99:
            print0(f"test views: batch {done} of {len(batches)}")
        clips, bad = sample["clip"].to(device, non_blocking=True), sample["replaced"][:, 0]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            results = function(cmaev.normalize(clips.flatten(0, 1)))
        results = results.float().unflatten(0, clips.shape[:2]).mean(dim=1).cpu()
        if not results[~bad].isfinite().all():
            raise CMAEVError("the model computes NaN or inf from clips that are fine: give --amp none, else "
                             "other weights")
        results[bad] = math.nan
        rows.extend(results.numpy())  # torch would send each row with its whole batch
    ranks = cmaev.objects_of_ranks(rows)
    return torch.from_numpy(np.stack([ranks[i % len(ranks)][i // len(ranks)] for i in range(len(views))]))


def accuracy(model, views, s, device, folder=None):
    """Top-1 and top-5 of a Classifier in per cent. With a folder the report is written and printed."""
    model.eval()
    scores = score_videos(lambda clips: model(clips).float().softmax(dim=1), views, s, device)
    top1, top5 = report(scores, views.videos, model.names, folder if cmaev.this_rank() == 0 else None)
    if folder:
        print0(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(views)} videos, {s.segments} x {s.crops} views "
               f"of {s.size} x {s.size}, {len(model.names)} classes (chance {100 / len(model.names):.2f} %); "
               f"{folder} holds predictions.csv")
    return top1, top5


def report(scores, videos, names, folder):
    """Scores [M, classes] of labelled videos -> top-1 and top-5 in per cent; writes to a folder, if given.

    A row of NaN, a video that cannot be read, counts as wrong. predictions.csv holds path, label and the five
    best classes with their probabilities.
    """
    labels, read = torch.tensor([label for _, label in videos]), ~scores.isnan().any(dim=1)
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & read[:, None]
    top1, top5 = 100 * float(hits[:, 0].float().mean()), 100 * float(hits.any(dim=1).float().mean())
    if folder is None:
        return top1, top5
    with cmaev.atomic_write(f"{folder}/predictions.csv") as file:
        rows = csv.writer(file)
        columns = [f"{what}{i}" for i in range(1, hits.shape[1] + 1) for what in ("class", "p")]
        rows.writerow(["path", "label", *columns])
        for (path, label), classes, values in zip(videos, best.indices.tolist(), best.values.tolist()):
            row = [path, names[label]]
            for i, p in zip(classes, values):
                row += ["unreadable", ""] if math.isnan(p) else [names[i], f"{p:.4f}"]
            rows.writerow(row)
    return top1, top5


def linear_probe(train, labels, test, classes, steps=500):
    """Linear classifier on frozen features, after a batch norm without affine [MAE] -> scores [M, classes].

    train [n, D], labels int64 [n], test [M, D]. Full-batch AdamW with a cosine schedule, no augmentation.
    """
    if len(train) < 2:
        raise CMAEVError("a linear probe needs two or more training videos that can be read")
    width = train.shape[1]
    probe = nn.Sequential(nn.BatchNorm1d(width, affine=False, momentum=None), nn.Linear(width, classes))
    nn.init.zeros_(probe[1].weight)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cmaev.learning_rate(step, 0, steps, 0, 0.01, 0)
        F.cross_entropy(probe(train), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return probe.eval()(test).softmax(dim=1)


def nearest_neighbours(train, labels, test, classes, k=20, temperature=0.07):
    """Weighted k-nearest-neighbour on frozen features [DINO] -> scores of `test` [M, classes].

    Each of the k most similar (cosine) training videos votes for its class, by exp(similarity / temperature).
    """
    similarity, nearest = (F.normalize(test) @ F.normalize(train).T).topk(min(k, len(train)), dim=1)
    votes = F.one_hot(labels[nearest], classes) * ((similarity - 1) / temperature).exp()[..., None]
    return votes.sum(dim=1) / votes.sum(dim=(1, 2))[:, None]


# Settings ---------------------------------------------------------------------------------------------------

def read_settings():
    """The command line -> settings. What it lacks is filled by the run in --out or --init, and the recipe."""
    parser = cmaev.argument_parser(__doc__)
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what to do").add_argument
    add("--probe", choices=["linear", "knn"], default="", help="instead of fine-tuning: frozen features")
    add("--eval", action=flag, default=False, help="only evaluate the run in --out; writes there too")
    add("--predict", nargs="+", metavar="FILE", help="only print the best classes of videos")
    add("--features", metavar="FILE", default="", help="only write the pooled features of --data, an .npz")
    add("--best", action=flag, default=False, help="--eval, --predict: best.pt instead of checkpoint.pt")
    add("--init", help="weights: a run, a file of this project, VideoMAE or Hugging Face, or none; gives the "
        "model's flags, a run --recipe too")
    add("--names", metavar="FILE", default="", help="class names of a list, one per line, label 0 first")
    add("--val-every", type=cmaev.WHOLE, default=5, help="epochs per one-view test, for best.pt; 0: none")

    add = parser.add_argument_group("clips").add_argument
    add("--sampling", choices=["dense", "uniform"], default="dense", help="a stride, or a frame per part")
    add("--rate", type=cmaev.COUNT, default=4, help="sampling rate r of dense sampling")
    add("--repeats", type=cmaev.COUNT, default=2, help="clips per opened video; multiplies those of a step")
    add("--smallest-crop", type=cmaev.number(float, "(0, 1]"), default=0.08, help="share of the frame's area")
    add("--flip", action=flag, default=True, help="horizontal flips; SSv2 has left and right as labels")
    add("--rand-augment", action=flag, default=True, help="RandAugment, four operations of strength 7")
    add("--erasing", type=cmaev.SHARE, default=0.25, help="probability of random erasing")
    add("--mixup", type=cmaev.NOT_NEGATIVE, default=0.8, help="alpha; 0: none")
    add("--cutmix", type=cmaev.NOT_NEGATIVE, default=1.0, help="alpha; 0: none; if both, one per micro-batch")
    add("--segments", type=cmaev.COUNT, default=5, help="test clips per video; --probe, --features: if given")
    add("--crops", type=cmaev.COUNT, default=3, help="test crops per clip; --probe, --features: if given")

    add = parser.add_argument_group("regularisation").add_argument
    add("--layer-decay", type=cmaev.number(float, "(0, 1]"), default=0.75, help="rate / the next layer's")
    add("--drop-path", type=cmaev.BELOW_ONE, default=0.1, help="stochastic depth of the last block")
    add("--smoothing", type=cmaev.BELOW_ONE, default=0.1, help="label smoothing")
    add_shared_settings(parser)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--init", nargs="?", default="none", const="none")
    init, argv = first.parse_known_args()[0].init, sys.argv[1:]
    if init != "none" and not os.path.exists(init):
        raise CMAEVError(f"--init {init}: no such run or file of weights: run pretrain.py first, or correct it")
    path = Path(init) / "settings.json"
    if path.is_file():  # of a run; a --recipe by hand comes later and wins
        record = cmaev.parse_json(path.read_bytes(), path, "settings")
        argv = ["--recipe", record["settings"]["recipe"], *argv]
    s = cmaev.parse_settings(parser, RECIPES, argv)
    if s.eval or s.predict:
        record, _ = read_record(s.out, s.best)
        for name in record["settings"].keys() - s.overridden.keys() - MACHINE - {"out"}:
            setattr(s, name, record["settings"][name])
        return s
    if not s.data:
        raise CMAEVError("--data is not given: name a list (`path label` per line) or class folders")
    if s.init != "none":
        take_sizes_of_init(s)
    if s.probe or s.features:
        for name in {"segments", "crops"} - s.overridden.keys():
            setattr(s, name, 1)
    return s


def take_sizes_of_init(s):
    """Takes SIZES from the weights of --init. A flag given by hand wins, with a note."""
    state, sizes = cmaev.read_weights(s.init)
    if "encoder" not in sizes:  # not of a run
        try:
            _, sizes = cmaev.encoder_of(state, sizes)
        except (KeyError, ValueError):
            return  # it holds no encoder: load_encoder says so
        for name, (_, entry) in cmaev.ENCODERS.items():
            if entry.items() <= sizes.items():
                sizes["encoder"] = name
        sizes["size"] = np.ravel(sizes["size"])[0].item()
    sizes["fusion"] = "fusion1.weight" in state or "patch_embed1.proj.weight" not in state  # of a ViT: unused
    for name in sorted(SIZES & sizes.keys()):
        if name not in s.overridden:
            setattr(s, name, sizes[name])
        elif getattr(s, name) != sizes[name]:
            print0(f"note: {cmaev.flag(s, name)}, as given, not the {sizes[name]} of {s.init}")


# What the script does ---------------------------------------------------------------------------------------

def train(s, device):
    """Fine-tunes, or continues the run in --out, and evaluates."""
    world, run, dtype = cmaev.world_size(), Path(s.out), cmaev.amp_dtype(s.amp, device)
    videos, tests, names, about = read_classes(s)
    cmaev.check_ranks(s, device, videos, tests, names)
    parts = cmaev.count_micro_batches(s)
    if len(videos) < s.batch_size:
        raise CMAEVError(f"{cmaev.flag(s, 'batch_size')}: give no more than the {len(videos)} videos")
    if s.batch_size // (world * parts) < 2 and (s.mixup or s.cutmix):
        raise CMAEVError(f"{cmaev.flag(s, 'batch_size')}, {cmaev.flag(s, 'micro_batch')}: mixup and cutmix need "
                         "two or more videos per rank at a time")
    model = build(s, names)
    if s.init != "none":
        cmaev.load_encoder(s.init, model.encoder)
    model.to(device)
    groups = layer_groups(model, s.weight_decay, s.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True)
    scaler = cmaev.grad_scaler(dtype, device)
    augment = training_augmentation(s.size, s.smallest_crop, s.flip, s.rand_augment, s.erasing)
    log = run / "bad-videos.jsonl"
    clips = TrainClips(videos, s.frames, s.rate, s.sampling, augment, s.repeats, s.seed, log)
    mix = mixing(s.mixup, s.cutmix, len(names))
    per_step, per_epoch = s.batch_size * s.repeats, len(videos) // s.batch_size
    steps = s.epochs * per_epoch

    cmaev.open_run(run, s, FREE, videos, **about)
    meter = cmaev.Meter(["loss"], device)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    start = cmaev.resume(run, state)
    evaluated = run / "predictions.csv"  # the evaluation at the end writes it
    if start == steps and cmaev.sum_over_ranks(torch.tensor(int(evaluated.exists()))):
        return print0(f"{run} is finished, all {steps} steps: give --eval, or another --out")
    evaluated.unlink(missing_ok=True)
    print0(f"{s.encoder}, {s.frames} x {s.size} x {s.size}, from {s.init}; {len(videos)} videos of "
           f"{len(names)} classes ({names[0]} to {names[-1]}), {steps} steps of {per_step} clips; "
           f"{world} x {device.type}, {dtype or torch.float32}"
           + (f"; continuing from step {start}" if start else ""))
    cmaev.note_weak_settings(s, steps)
    parallel = cmaev.data_parallel(model)
    if s.compile:
        parallel = torch.compile(parallel)
    one_view = TestViews(tests, s.frames, s.rate, s.size, s.sampling)
    received = cmaev.notice_signals()
    order = cmaev.batches(len(videos), s.batch_size, steps, s.seed, start, parts)
    feed = cmaev.Feed(cmaev.loader(clips, s.workers, device, batch_sampler=order), device)
    model.train()
    for step in range(start, steps):
        lr = cmaev.set_learning_rate(optimizer, s, step, per_epoch)
        torch.manual_seed(cmaev.seed_of(s.seed, step, cmaev.this_rank()))  # of mixup and drop path
        step_loss = replaced = 0
        for part in range(parts):
            batch = next(feed)
            clip, labels = mix(cmaev.normalize(batch["clip"]), batch["label"])
            parallel.require_backward_grad_sync = part == parts - 1  # when DDP averages the gradients
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = parallel(clip)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=s.smoothing) / parts
            scaler.scale(loss).backward()
            step_loss, replaced = step_loss + loss.detach(), replaced + batch["replaced"].sum()
        grad_norm = cmaev.optimizer_step(model.parameters(), optimizer, scaler, dtype, s.clip_grad)
        meter.add([step_loss], grad_norm, replaced)

        done = step + 1
        last = done == steps
        if done > 1 and done % s.log_every and not last:
            continue
        due = lambda every: every > 0 and (last or done // every > meter.step // every)  # since the last line
        save, validate, stop = due(s.save_every), due(s.val_every * per_epoch), received()
        record = meter.read(done, per_step, per_epoch, s.bad_share)
        record |= dict(lr=lr, grad_norm=grad_norm.item(), data_wait=feed.waited() / record["seconds"])
        text = f"loss {record['loss']:.4f}"
        if stop:  # before the validation, as SLURM soon kills
            cmaev.save_checkpoint(run, done, state)
        if validate:
            top1, top5 = accuracy(model, one_view, s, device)
            text += f"  top-1 {top1:.2f} %"
            before = cmaev.read_log(run) if cmaev.this_rank() == 0 else []
            if all(top1 > line.get("val_top1", -1) for line in before):
                cmaev.save_checkpoint(run, done, dict(model=model), "best.pt")
            record |= dict(val_top1=top1, val_top5=top5)
            model.train()
            meter.began = time.perf_counter()
        cmaev.write_log(run, record, steps, text)
        if save and not stop:
            cmaev.save_checkpoint(run, done, state)
        if stop:
            cmaev.stop_run(stop, done)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cmaev.SAVED_AND_STOPPED))
    print0(f"{meter.counts['bad_clips']} of {steps * per_step} clips were of bad videos")
    accuracy(model, test_views(s, tests), s, device, run)


def evaluate(s, device):
    """--eval: the accuracy of the run in --out; the report goes to a folder of its own."""
    record, weights = read_record(s.out, s.best)
    model, tests = load(s.out, s.best, s).to(device), record["held_out"]
    if s.val:
        tests = numbered(read_labelled(s.val), record["classes"], s.val)
    folder = Path(s.out) / f"eval-{weights.stem}-{s.size}-{s.segments}x{s.crops}"
    folder.mkdir(exist_ok=True)
    accuracy(model, test_views(s, tests), s, device, folder)


def predict(s, device):
    """--predict: prints the five best classes of each file."""
    model, bad = load(s.out, s.best, s).to(device), 0
    for file in s.predict:
        try:
            text = ", ".join(f"{name} {p:.1%}" for name, p in model.predict(file)[:5])
        except cmaev.BadVideo as error:
            text, bad = str(error).removeprefix(f"{file}: "), bad + 1
        print0(f"{file}: {text}")
    if bad:
        raise CMAEVError(f"{bad} of {len(s.predict)} files could not be read")


def frozen_encoder(s):
    """The encoder for --probe and --features."""
    if s.init != "none" and not SIZES & s.overridden.keys():
        return cmaev.load_encoder(s.init)  # also one that ENCODERS does not have
    torch.manual_seed(s.seed)
    encoder = cmaev.build_encoder(s.encoder, s.fusion, frames=s.frames, size=s.size, tubelet=s.tubelet,
                                  patch=s.patch)
    return encoder if s.init == "none" else cmaev.load_encoder(s.init, encoder)


def pooled_features(s, encoder, videos, device):
    """Means of an encoder's tokens over each video's test views -> float32 [M, D]; NaN for a bad video."""
    encoder.to(device).eval()
    print0(f"features of {len(videos)} videos, {s.segments} x {s.crops} views each")
    return score_videos(lambda clips: encoder(clips).mean(dim=1), test_views(s, videos), s, device)


def probe(s, device):
    """--probe: prints the top-1 accuracy of a linear or k-NN probe on frozen, mean-pooled features."""
    videos, tests, names, _ = read_classes(s)
    cmaev.check_ranks(s, device, videos, tests, names)
    encoder = frozen_encoder(s)
    train, test = (pooled_features(s, encoder, listed, device) for listed in (videos, tests))
    labels, read = torch.tensor([label for _, label in videos]), ~train.isnan().any(dim=1)
    classify = dict(linear=linear_probe, knn=nearest_neighbours)[s.probe]
    scores = classify(train[read], labels[read], test, len(names))  # NaN for a video that cannot be read
    top1, _ = report(scores, tests, names, None)
    print0(f"{s.probe} probe of {s.init}: top-1 {top1:.2f} % of {len(tests)} videos, {len(videos)} labels "
           f"(chance {100 / len(names):.2f} %)")


def write_features(s, device):
    """--features: writes the features of the videos of --data, their paths, and their labels (-1: none)."""
    if s.init == "none":
        raise CMAEVError("--features: give --init, the weights of an encoder")
    if os.path.isdir(s.features) or not os.access(os.path.dirname(s.features) or ".", os.W_OK):
        raise CMAEVError(f"--features {s.features} cannot be written: give a file in an existing folder")
    videos = cmaev.read_list(s.data)
    features = pooled_features(s, frozen_encoder(s), videos, device)
    if cmaev.this_rank() == 0:
        with cmaev.atomic_write(s.features, "wb") as file:
            np.savez(file, features=features.numpy(), paths=[path for path, _ in videos],
                     labels=[-1 if label is None else label for _, label in videos])
    print0(f"{s.features} holds features {list(features.shape)}, NaN for bad videos; paths; labels")


def main():
    device = cmaev.join_ranks()
    s = read_settings()
    if s.predict:
        predict(s, device)
    elif s.eval:
        evaluate(s, device)
    elif s.features:
        write_features(s, device)
    elif s.probe:
        probe(s, device)
    else:
        train(s, device)


if __name__ == "__main__":
    cmaev.run_script(main)
