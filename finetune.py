"""Fine-tunes a pre-trained encoder for action recognition; probes the encoder; evaluates and applies the classifier.

    python finetune.py                                                   the demo, from the run of `python pretrain.py`
    python finetune.py --probe linear                                    frozen features; or --probe knn
    python finetune.py --eval --segments 5 --crops 3                     evaluates the run in --out
    python finetune.py --predict clip.mp4                                the five best classes of a video
    python finetune.py --features out.npz --data list.txt --init encoder.pt
    torchrun --standalone --nproc_per_node=8 finetune.py --recipe k400 --data train.txt --val val.txt --init encoder.pt

The same command run again continues from the last checkpoint. --help lists the settings of a recipe.
"""

import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import cmaev  # before torch: it sets how OpenMP's threads wait
from pretrain import add_shared_settings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

# What differs from the flags' defaults: the paper's and VideoMAE's for K400 and SSv2, ours for the demo
COMMON = dict(warmup_epochs=5, lr=5e-4, min_lr=1e-6, beta2=0.999)
RECIPES = {
    "demo": COMMON | dict(
        data="data/demo/train.txt", val="data/demo/val.txt", out="runs/finetune-demo", init="runs/pretrain-demo",
        encoder="vit_tiny", frames=8, size=56, patch=8, repeats=1, smallest_crop=0.5, flip=False, rand_augment=False,
        erasing=0.0, mixup=0.0, cutmix=0.0, segments=1, crops=1, epochs=20, warmup_epochs=2, batch_size=16, lr=1.6e-2,
        log_every=25, save_every=100),
    "small": COMMON | dict(out="runs/finetune-small", init="runs/pretrain-small", encoder="vit_small", size=112,
                           patch=8, epochs=75, batch_size=128, micro_batch=16),
    "k400": COMMON | dict(out="runs/finetune-k400", init="runs/pretrain-k400", epochs=75, batch_size=384),
    "ssv2": COMMON | dict(out="runs/finetune-ssv2", init="runs/pretrain-ssv2", sampling="uniform", flip=False,
                          segments=2, epochs=50, batch_size=512),
}
MACHINE = {"compile", "workers", "log_every", "save_every"}
FREE = MACHINE | {"micro_batch", "bad_share", "segments", "crops", "val", "val_every", "eval", "predict", "features",
                  "best", "overridden"}  # may change when a run continues


# =====================================================================================================================
# Labelled clips
# =====================================================================================================================


def read_labelled(path, flag):
    """read_list for labelled videos -> [(path, label)]. Raises CMAEVError for an empty path or a missing label."""
    if not path:
        raise cmaev.CMAEVError(f"--{flag} is not given: name a list (`path label` per line) or class folders")
    videos = cmaev.read_list(path)
    for video, label in videos:
        if label is None or label < 0:
            what = "no label" if label is None else f"label {label}"
            raise cmaev.CMAEVError(f"{path}: {video} has {what}: give 0, 1, 2, ..., or a folder per class")
    return videos


def class_folder(video, root):
    """The class folder of a video of read_list(root): the first folder below the root."""
    return os.path.relpath(video, root).split(os.sep)[0]


def class_names(videos, source="", file=""):
    """The names of classes 0, 1, ... of the labelled videos of a list or folder `source`.

    `file`, in UTF-8, holds one name per line. Without it, a name is the class folder or, in a list, the folder
    that holds the videos, if each class has its own; else the label. Raises CMAEVError for a label without a name
    of its own and, without a file, for a class between 0 and the largest that has no video.
    """
    if file:
        if os.path.isdir(source):
            raise cmaev.CMAEVError("--names is for lists: a folder's classes are its class folders")
        if not os.path.isfile(file):
            raise cmaev.CMAEVError(f"--names {file}: no such file: give a text file, one name per line")
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")  # sig: skips a byte order mark
        names = [line.strip() for line in text.rstrip().split("\n")]
        for i, name in enumerate(names):
            if not name or {"\ufffd", "\0"} & set(name) or name in names[:i]:
                raise cmaev.CMAEVError(f"{file}, line {i + 1}: {name!r:.60} is empty, not UTF-8, or there twice: give "
                                       "each label a name of its own")
        if (largest := max(label for _, label in videos)) >= len(names):
            raise cmaev.CMAEVError(f"{file} has {len(names)} names, but {source} has label {largest}: give a name per "
                                   "line, label 0 first")
        return names
    folders = {}
    for path, label in videos:
        folder = class_folder(path, source) if os.path.isdir(source) else Path(path).parent.name
        folders.setdefault(label, set()).add(folder)
    if missing := [label for label in range(len(folders)) if label not in folders]:  # labels may be huge
        raise cmaev.CMAEVError(f"class {missing[0]} of 0 to {max(folders)} has no video in the list: renumber them")
    own = len(set.union(*folders.values())) == len(folders) and all(len(names) == 1 for names in folders.values())
    return [folders[label].pop() if own else str(label) for label in range(len(folders))]


def read_test_videos(path, names, by_name):
    """The labelled videos of --val under the training classes `names` -> [(path, label)].

    Class folders are matched by name. The labels of a list count as they are; but where training had class folders
    (`by_name`), a label that contradicts the class folder in its path is an error.
    Raises CMAEVError for a class or label that training did not have.
    """
    videos, number = read_labelled(path, "val"), {name: i for i, name in enumerate(names)}
    if os.path.isdir(path):
        folders = [class_folder(video, path) for video, _ in videos]
        if unknown := sorted(set(folders) - set(names)):
            raise cmaev.CMAEVError(f"{path}: class folders {', '.join(unknown)} are none of the training classes "
                                   f"{', '.join(names)}: rename or remove them")
        return [(video, number[folder]) for (video, _), folder in zip(videos, folders)]
    for video, label in videos:
        if label >= len(names):
            raise cmaev.CMAEVError(f"{path}: {video} has label {label}: give 0 to {len(names) - 1}, the classes of the "
                                   "training list")
        below = os.path.relpath(video, os.path.dirname(path)).split(os.sep)[-2::-1]  # folders, from the video upwards
        named = next((folder for folder in below if folder in number), names[label])
        if by_name and named != names[label]:
            raise cmaev.CMAEVError(f"{path}: {video} has label {label}, which is {names[label]} in training, but its "
                                   f"folder is {named}: number the classes as in training, or give a folder for --val")
    return videos


def hold_out(videos, seed):
    """A seeded tenth of each class, at least one if it has two -> (videos to train on, videos to test on)."""
    with cmaev.seeded(seed) as generator:
        order = torch.randperm(len(videos), generator=generator).tolist()
    tests = set()
    for label in {label for _, label in videos}:
        members = [i for i in order if videos[i][1] == label]
        tests.update(members[:max(round(len(members) / 10), int(len(members) > 1))])
    return [v for i, v in enumerate(videos) if i not in tests], [videos[i] for i in sorted(tests)]


def uniform_indices(num_frames, frames, offset):
    """One frame from each of `frames` equal segments [TSN]; `offset` in [0, 1), one or [frames], places it inside."""
    return ((torch.arange(frames) + offset) * num_frames / frames).long().clamp(max=num_frames - 1)


class LabelledClips(cmaev.VideoClips):
    """Labelled clips for fine-tuning and testing.

    `sampling` is "dense" (a stride of `rate`, K400) or "uniform" (one frame per segment, SSv2). For training, `augment`
    is a transform of uint8 [T, 3, H, W] and `repeats` clips come out of one opened video [repeated sampling], with
    frames of their own [choice] (VideoMAE augments the same ones twice). Without `augment`, the clips are the test
    views: segments x crops, crops along the long side.
    dataset[epoch, index], V clips:
        clip      uint8 [V, T, 3, S, S]   black where a test video cannot be read
        label     int64 [V]
        index     int64 [V]
        replaced  bool [V]                whether another video or black takes the place of a bad one
    """

    def __init__(self, videos, frames, rate, size, sampling, augment=None, repeats=1, segments=1, crops=1, seed=0,
                 log=None):
        super().__init__(videos, seed, log)
        if sampling not in ("dense", "uniform"):
            raise cmaev.CMAEVError(f"no sampling {sampling!r}: give 'dense' or 'uniform'")
        self.frames, self.rate, self.size, self.sampling, self.augment = frames, rate, size, sampling, augment
        self.repeats, self.segments, self.crops = repeats, segments, crops
        if not augment:
            self.attempts = 1

    def sample(self, video, label, index, generator):
        """`video`: a Video, or all of its frames, uint8 [n, H, W, 3]."""
        indices = torch.stack(self.frame_indices(len(video)))
        frames = video[indices.flatten()] if torch.is_tensor(video) else video.read(indices.flatten())
        clips = frames.unflatten(0, indices.shape).movedim(-1, 2)  # [V, T, 3, H, W]
        to_views = (lambda clip: [self.augment(clip)]) if self.augment else self.test_crops
        return self.labelled(torch.stack([view for clip in clips for view in to_views(clip)]), label, index)

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except cmaev.BadVideo:
            if self.augment:
                raise
        num_views, index = self.segments * self.crops, key[1]
        black = torch.zeros(num_views, self.frames, 3, self.size, self.size, dtype=torch.uint8)
        sample = self.labelled(black, self.videos[index][1], index)
        return sample | {"replaced": torch.ones(num_views, dtype=torch.bool)}

    def labelled(self, clips, label, index):
        return {"clip": clips, "label": torch.full((len(clips),), -1 if label is None else label),
                "index": torch.full((len(clips),), index)}

    def frame_indices(self, num_frames):
        """Draws `repeats` clips or, in testing, places `segments` clips evenly -> list of int64 [T].

        Test clips [VideoMAE]: dense, from the first to the last start, rounded down (VideoMAE's are multiples of
        the rate); uniform, at 0, 1 / segments, 2 / segments, ... of each part. A single clip: the middle.
        The last frame of a video shorter than a dense clip repeats [VideoMAE].
        """
        n = self.segments
        if self.sampling == "dense":
            last = max(num_frames - 1 - (self.frames - 1) * self.rate, 0)
            starts = [k * last // (n - 1) for k in range(n)] if n > 1 else [(last + 1) // 2]
            if self.augment:
                starts = torch.randint(last + 1, (self.repeats,)).tolist()
            return [(start + self.rate * torch.arange(self.frames)).clamp(max=num_frames - 1) for start in starts]
        offsets = [k / n for k in range(n)] if n > 1 else [0.5]
        if self.augment:
            offsets = [torch.rand(self.frames) for _ in range(self.repeats)]
        return [uniform_indices(num_frames, self.frames, offset) for offset in offsets]

    def test_crops(self, clip):
        """Short side to S, then crops of S x S evenly along the long side, one in its middle: [T, 3, H, W] -> list."""
        clip = v2.functional.resize(clip, [self.size], antialias=True)
        room = [side - self.size for side in clip.shape[2:]]
        k_of_n = [(k, self.crops - 1) for k in range(self.crops)] if self.crops > 1 else [(1, 2)]
        corners = [[k * free // n for free in room] for k, n in k_of_n]  # rounded down [VideoMAE]
        return [clip[..., top:top + self.size, left:left + self.size] for top, left in corners]


def training_augmentation(size, smallest_crop, flip, rand_augment, erasing):
    """VideoMAE's augmentation for fine-tuning by torchvision, one draw per clip: uint8 [T, 3, H, W] -> [T, 3, S, S].

    [choice] timm's rand-m7-n4-mstd0.5-inc1 skips each operation half of the time and varies its strength;
    torchvision applies all four at strength 7 of 10, posterises to 5 bits instead of 2, has Identity instead of
    Invert and SolarizeAdd, and interpolates bilinearly, not bicubically. timm erases with noise, ours with a colour.
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
    """Mixup and cutmix with these alphas (0: without), one of the two per micro-batch -> a function:

    clips [B, ..., H, W], labels int64 [B] -> mixed clips, soft labels [B, classes]. One lambda per micro-batch [timm].
    """
    chosen = [transform(alpha=alpha, num_classes=classes)
              for transform, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not chosen:
        return lambda clips, labels: (clips, labels)
    either = v2.RandomChoice(chosen)

    def mix(clips, labels):
        clips, labels = either(tv_tensors.Video(clips), labels)
        return clips.as_subclass(torch.Tensor), labels
    return mix


# =====================================================================================================================
# Classifier and probes
# =====================================================================================================================


class Classifier(nn.Module):
    """Mean of all tokens, LayerNorm, linear head [VideoMAE]: clip [B, 3, T, H, W] -> logits [B, classes].

    `fc_norm` replaces the encoder's final norm. `build` sets `names` and `test_clips`, which `predict` needs.
    """

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.encoder.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)  # init_scale .001 [VideoMAE]
        nn.init.zeros_(self.head.bias)

    def forward(self, clip):
        return self.head(self.fc_norm(self.encoder(clip).mean(dim=1)))

    def head_state(self):
        """The state dict without the encoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    @torch.no_grad()
    def predict(self, video):
        """Classifies a video -> [(class name, probability)], the best first.

        `video`: a path; all frames of a video, uint8 [n, H, W, 3], a tensor or an array; or a list of these, for
        a list of results. Raises BadVideo for a file that cannot be read, CMAEVError for other frames.
        """
        if isinstance(video, (list, tuple)):
            return [self.predict(each) for each in video]
        if not isinstance(video, (str, os.PathLike)):
            frames = np.ascontiguousarray(video)  # torch takes no reversed channels
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
                got = f"{frames.dtype} {list(frames.shape)}"
                raise cmaev.CMAEVError(f"{got}: give a path, or all frames of a video, uint8 [n, H, W, 3]")
            views = self.test_clips([]).sample(torch.from_numpy(frames), None, 0, None)["clip"]
        else:
            views = self.test_clips([]).read_sample(video, None, 0)["clip"]
        scores = self(cmaev.normalize(views.to(self.head.weight.device))).softmax(dim=1).mean(dim=0)
        best = scores.argsort(descending=True).tolist()
        return [(self.names[i], float(scores[i])) for i in best]


def build(s, names):
    """A run's settings and class names -> Classifier."""
    torch.manual_seed(s.seed)
    encoder = cmaev.build_encoder(s.encoder, fusion=False, frames=s.frames, size=s.size, tubelet=s.tubelet,
                                  patch=s.patch, drop_path=s.drop_path)  # without fusion, as ConvMAE
    model = Classifier(encoder, len(names))
    model.names, model.test_clips = names, lambda videos: LabelledClips(
        videos, s.frames, s.rate, s.size, s.sampling, segments=s.segments, crops=s.crops)
    return model


def read_record(run, best=False, name=""):
    """A run's settings.json and the path of its weights. Raises CMAEVError if it has none; `name`: the run's."""
    weights = Path(run) / ("best.pt" if best else "checkpoint.pt")
    path, record = Path(run) / "settings.json", {}
    if weights.exists():
        record = cmaev.parse_json(path.read_bytes(), path, "settings")
    if "names" not in record:
        raise cmaev.CMAEVError(f"{name or run} holds no {weights.name} of finetune.py: fine-tune, or give another"
                               " folder")
    return record, weights


def load(run, best=False, settings=None):
    """Loads the Classifier of a run of this script, on the CPU, in eval mode.

    `best`: from best.pt, not checkpoint.pt. `settings`: in place of the run's, for example another number of views.
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


def linear_probe(train, labels, test, classes, steps=500):
    """Linear classifier on frozen features, after a batch norm without affine [MAE] -> scores of `test` [M, classes].

    train [n, D], labels int64 [n], test [M, D]. Full-batch AdamW with a cosine schedule, without augmentation.
    """
    if len(train) < 2:
        raise cmaev.CMAEVError("a linear probe needs two or more training videos that can be read")
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

    Each of the k most similar (cosine) training videos votes for its class with weight exp(similarity / temperature).
    """
    similarity, nearest = (F.normalize(test) @ F.normalize(train).T).topk(min(k, len(train)), dim=1)
    votes = F.one_hot(labels[nearest], classes) * ((similarity - 1) / temperature).exp()[..., None]
    return votes.sum(dim=1) / votes.sum(dim=(1, 2))[:, None]


@torch.no_grad()
def score_videos(function, clips, batch, workers, device):
    """Applies function(clips [n, 3, T, H, W]) -> [n, C] to all views; returns the mean over each video's views [M, C].

    Rank r takes the videos r, r + world, ...: each video once. The row of a video that cannot be read is NaN.
    """
    rows = {}
    batches = cmaev.loader(clips, workers, device, batch_size=batch, sampler=cmaev.rank_indices(clips))
    for done, sample in enumerate(batches):
        if done % 100 == 99:
            cmaev.print0(f"test views: batch {done} of {len(batches)}")
        views = sample["clip"].to(device, non_blocking=True)
        results = function(cmaev.normalize(views.flatten(0, 1))).float().unflatten(0, views.shape[:2]).mean(dim=1).cpu()
        if not results[~sample["replaced"][:, 0]].isfinite().all():
            raise cmaev.CMAEVError("the model computes NaN or inf from clips that are fine: give --amp none, or, if it "
                                   "does so then, other weights")
        results[sample["replaced"][:, 0]] = math.nan
        rows |= zip(sample["index"][:, 0].tolist(), results)
    rows = {i: row for part in cmaev.objects_of_ranks(rows) for i, row in part.items()}
    return torch.stack([rows[i] for i in range(len(clips))])


def report(scores, videos, names, folder):
    """Scores [M, classes] of labelled videos -> top-1 and top-5 in per cent; writes the report to a folder, if given.

    A row of NaN, a video that cannot be read, counts as wrong. predictions.csv holds path, label and the five best
    classes with their probabilities; per-class.json holds each class's accuracy in per cent.
    """
    labels, read = torch.tensor([label for _, label in videos]), ~scores.isnan().any(dim=1)
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & read[:, None]
    top1, top5 = 100 * float(hits[:, 0].float().mean()), 100 * float(hits.any(dim=1).float().mean())
    if folder is None:
        return top1, top5
    with cmaev.atomic_write(f"{folder}/predictions.csv") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", *(f"{what}{i + 1}" for i in range(hits.shape[1]) for what in ("class", "p"))])
        for (path, label), classes, values in zip(videos, best.indices.tolist(), best.values.tolist()):
            rows.writerow([path, names[label], *(v for n, p in zip(classes, values) for v in (
                ("unreadable", "") if math.isnan(p) else (names[n], f"{p:.4f}")))])
    with cmaev.atomic_write(f"{folder}/per-class.json") as file:
        json.dump({names[i]: round(100 * float(hits[labels == i, 0].float().mean()), 2)
                   for i in labels.unique().tolist()}, file, indent=1)
    return top1, top5


# =====================================================================================================================
# The script
# =====================================================================================================================


def read_settings():
    parser = cmaev.argument_parser(__doc__)
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what to do").add_argument
    add("--probe", choices=["linear", "knn"], default="", help="instead of fine-tuning: frozen features")
    add("--eval", action=flag, default=False, help="only evaluate the run in --out; writes there too")
    add("--predict", nargs="*", metavar="FILE", help="only print the best classes; after -- if a name begins with -")
    add("--features", metavar="FILE", default="", help="only write the mean-pooled features of --data, an .npz file")
    add("--best", action=flag, default=False, help="--eval, --predict: best.pt instead of checkpoint.pt")
    add("--init", help="weights: a run of pretrain.py, a file of this project, VideoMAE or Hugging Face, or none")
    add("--names", metavar="FILE", default="", help="names of the classes of a list, one per line, label 0 first")
    add("--val-every", type=cmaev.WHOLE, default=5, help="epochs between one-view tests, which choose best.pt; 0: none")

    add = parser.add_argument_group("clips").add_argument
    add("--sampling", choices=["dense", "uniform"], default="dense", help="every rate-th frame, or one per segment")
    add("--rate", type=cmaev.COUNT, default=4, help="sampling rate r of dense sampling")
    add("--repeats", type=cmaev.COUNT, default=2, help="clips per opened video; a step has batch size x repeats")
    add("--smallest-crop", type=cmaev.number(float, "(0, 1]"), default=0.08, help="as a share of the frame's area")
    add("--flip", action=flag, default=True, help="horizontal flips; SSv2 has left and right as labels")
    add("--rand-augment", action=flag, default=True, help="RandAugment, four operations of strength 7")
    add("--erasing", type=cmaev.SHARE, default=0.25, help="probability of random erasing")
    add("--mixup", type=cmaev.NOT_NEGATIVE, default=0.8, help="alpha; 0: none")
    add("--cutmix", type=cmaev.NOT_NEGATIVE, default=1.0, help="alpha; 0: none; if both, one per micro-batch")
    add("--segments", type=cmaev.COUNT, default=5, help="test clips per video, over time")
    add("--crops", type=cmaev.COUNT, default=3, help="test crops per clip, over space")

    add = parser.add_argument_group("regularisation").add_argument
    add("--layer-decay", type=cmaev.number(float, "(0, 1]"), default=0.75, help="learning rate / the next layer's")
    add("--drop-path", type=cmaev.BELOW_ONE, default=0.1, help="stochastic depth of the last block")
    add("--smoothing", type=cmaev.BELOW_ONE, default=0.1, help="label smoothing")
    add_shared_settings(parser)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    files = sys.argv[end + 1:]  # after --, names may begin with -
    s = cmaev.parse_settings(parser, RECIPES, sys.argv[1:end])
    if files and s.predict is None:
        raise cmaev.CMAEVError(f"{files[0]}: only --predict takes files")
    if s.predict is not None:
        s.predict += files
        if not s.predict:
            raise cmaev.CMAEVError("--predict: name one or more videos; after -- if a name begins with -")
    if s.eval or s.predict:
        record, _ = read_record(s.out, s.best, cmaev.flag(s, "out"))
        for name in record["settings"].keys() - s.overridden.keys() - MACHINE - {"out"}:
            setattr(s, name, record["settings"][name])
        return s, record
    return s, None


def read_classes(s):
    """Reads --data, --val, --subset -> training videos, test videos, class names, what settings.json stores of them."""
    videos, held_out = read_labelled(s.data, "data"), None
    if not s.val:
        videos, held_out = hold_out(videos, s.seed)
        if not held_out:
            raise cmaev.CMAEVError(f"{s.data} has one video per class: give --val, videos to test on")
        cmaev.print0(f"no --val: {len(held_out)} of the {len(videos) + len(held_out)} videos of {s.data}, a tenth of "
                     f"each class drawn by --seed {s.seed}, are held out to test on")
    names, class_folders = class_names(videos + (held_out or []), s.data, s.names), os.path.isdir(s.data)
    tests = held_out or read_test_videos(s.val, names, class_folders)
    videos = cmaev.subset(videos, s.subset, s.seed)
    cmaev.check_readable(videos)
    cmaev.check_readable(tests)
    return videos, tests, names, dict(names=names, held_out=held_out, class_folders=class_folders)


def main():
    s, record = read_settings()
    device = cmaev.join_ranks()
    world, run, dtype = cmaev.world_size(), Path(s.out), cmaev.amp_dtype(s.amp, device)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)

    def score(function, clips):
        with autocast():
            batch = max(1, (s.micro_batch or s.batch_size // world) // (clips.segments * clips.crops))
            return score_videos(function, clips, batch, s.workers, device)

    def evaluate(model, clips, folder=None):
        """Top-1 and top-5 on test clips; with a folder the report is written and printed."""
        model.eval()
        scores = score(lambda clips: model(clips).float().softmax(dim=1), clips)
        top1, top5 = report(scores, clips.videos, model.names, folder if cmaev.this_rank() == 0 else None)
        if folder:
            cmaev.print0(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(clips)} videos, {s.segments} x {s.crops} "
                         f"views, {len(model.names)} classes (chance {100 / len(model.names):.2f} %); {folder} holds "
                         "predictions.csv")
        return top1, top5

    if record:
        model = load(run, s.best, s).to(device)
        if s.predict:
            return predict(model, s.predict)
        tests = read_test_videos(s.val, model.names, record["class_folders"]) if s.val else record["held_out"]
        checkpoint = "best" if s.best else "checkpoint"
        folder = run / f"eval-{checkpoint}-{s.size}-{s.segments}x{s.crops}"
        folder.mkdir(exist_ok=True)
        cmaev.print0(f"testing {run}/{checkpoint}.pt: {s.segments} x {s.crops} views of {s.size} x {s.size}")
        return evaluate(model, model.test_clips(tests), folder)
    s.data, val = cmaev.split_folder(s.data)
    s.val = s.val or val
    if s.features:
        return write_features(s, score, device)

    videos, tests, names, about = read_classes(s)
    cmaev.check_ranks(s, device, videos, tests, names)
    if s.probe:
        return probe(s, videos, tests, names, score, device)
    parts = cmaev.micro_batches(s)
    if len(videos) < s.batch_size:
        raise cmaev.CMAEVError(f"{cmaev.flag(s, 'batch_size')}: give no more than the {len(videos)} videos "
                               f"of {s.data}")
    if s.batch_size // (world * parts) < 2 and (s.mixup or s.cutmix):
        raise cmaev.CMAEVError(f"{cmaev.flag(s, 'batch_size')}, {cmaev.flag(s, 'micro_batch')}: --mixup and "
                               "--cutmix need two or more videos per rank at a time")
    model = build(s, names)
    if s.init != "none":
        cmaev.load_encoder(s.init, model.encoder)
    model.to(device)
    groups = layer_groups(model, s.weight_decay, s.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True)
    scaler = cmaev.grad_scaler(dtype, device)
    augment = training_augmentation(s.size, s.smallest_crop, s.flip, s.rand_augment, s.erasing)
    clips = LabelledClips(videos, s.frames, s.rate, s.size, s.sampling, augment, s.repeats, seed=s.seed,
                          log=run / "bad-videos.jsonl")
    mix = mixing(s.mixup, s.cutmix, len(names))
    per_step, per_epoch = s.batch_size * s.repeats, len(videos) // s.batch_size
    steps = s.epochs * per_epoch

    cmaev.open_run(run, s, FREE, videos, **about)
    meter = cmaev.Meter(["loss"], device)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    start = cmaev.resume(run, state)
    evaluated = run / "per-class.json"  # the last file that the evaluation at the end writes
    if start == steps and cmaev.sum_over_ranks(torch.tensor(int(evaluated.exists()))):
        return cmaev.print0(f"{run} is finished, all {steps} steps: give --eval, or another --out")
    evaluated.unlink(missing_ok=True)
    cmaev.print0(f"{s.encoder} from {s.init}; {len(videos)} videos of {len(names)} classes ({names[0]} to "
                 f"{names[-1]}), {steps} steps of {per_step} clips; {world} x {device.type}, {dtype or torch.float32}"
                 + (f"; continuing from step {start}" if start else ""))

    cmaev.note_weak_settings(s, steps)
    parallel = cmaev.data_parallel(model)
    if s.compile:
        parallel = torch.compile(parallel)
    one_view = LabelledClips(tests, s.frames, s.rate, s.size, s.sampling)
    received = cmaev.notice_signals()
    feed = cmaev.Feed(cmaev.loader(clips, s.workers, device, batch_sampler=cmaev.batches(
        len(videos), s.batch_size, steps, s.seed, start, parts)), device)
    model.train()
    for step in range(start, steps):
        lr = cmaev.set_learning_rate(optimizer, s, step, per_epoch)
        torch.manual_seed(cmaev.seed_of(s.seed, step, cmaev.this_rank()))  # mixup, drop path: the same after a restart
        step_loss = replaced = 0
        for part in range(parts):
            batch = next(feed)
            clip, labels = mix(cmaev.normalize(batch["clip"]), batch["label"])
            parallel.require_backward_grad_sync = part == parts - 1  # when DDP averages the gradients
            with autocast():
                logits = parallel(clip)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=s.smoothing) / parts
            scaler.scale(loss).backward()
            step_loss, replaced = step_loss + loss.detach(), replaced + batch["replaced"].sum()
        grad_norm = cmaev.optimizer_step(model.parameters(), optimizer, scaler, dtype, s.clip_grad)
        meter.add([step_loss], grad_norm, replaced)

        done, last = step + 1, step + 1 == steps
        if done == 1 or done % s.log_every == 0 or last:
            due = lambda every: every and done // every > meter.step // every or last
            save, validate, stop = due(s.save_every), s.val_every and due(s.val_every * per_epoch), received()
            record = meter.read(done, per_step, per_epoch, s.bad_share)
            record |= dict(lr=lr, grad_norm=grad_norm.item(), data_wait=feed.waited() / record["seconds"])
            text = f"loss {record['loss']:.4f}"
            if stop:  # before the validation, as SLURM soon kills
                cmaev.save_checkpoint(run, done, state)
            if validate:
                record["val_top1"], record["val_top5"] = evaluate(model, one_view)
                text += f"  top-1 {record['val_top1']:.2f} %"
                if cmaev.this_rank() == 0 and not any(
                        line.get("val_top1", -1) >= record["val_top1"] for line in cmaev.read_log(run)):
                    cmaev.save_checkpoint(run, done, dict(model=model), "best.pt")
                model.train()
                meter.began = time.perf_counter()
            cmaev.write_log(run, record, steps, text)
            if save and not stop:
                cmaev.save_checkpoint(run, done, state)
            if stop:
                cmaev.stop_run(stop, done)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cmaev.SAVED_AND_STOPPED))
    cmaev.print0(f"{meter.counts['bad_clips']} of {steps * per_step} clips were of bad videos")
    evaluate(model, model.test_clips(tests), run)


def predict(model, files):
    """Prints the five best classes of each file. Raises CMAEVError if one cannot be read."""
    unreadable = 0
    for file in files:
        try:
            cmaev.print0(f"{file}: " + ", ".join(f"{name} {p:.1%}" for name, p in model.predict(file)[:5]))
        except cmaev.BadVideo as error:
            unreadable += 1
            cmaev.print0(f"bad video: {cmaev.last_line(error)}")
    if unreadable:
        raise cmaev.CMAEVError(f"{unreadable} of {len(files)} files could not be read")


def probe(s, videos, tests, names, score, device):
    """Prints the top-1 accuracy of a linear or k-NN probe on frozen, mean-pooled features."""
    torch.manual_seed(s.seed)
    encoder = cmaev.build_encoder(s.encoder, fusion=s.fusion, frames=s.frames, size=s.size, tubelet=s.tubelet,
                                  patch=s.patch)
    if s.init != "none":
        cmaev.load_encoder(s.init, encoder)
    train, test = (pooled_features(s, encoder, listed, score, device) for listed in (videos, tests))
    labels, read = torch.tensor([label for _, label in videos]), ~train.isnan().any(dim=1)
    scores = dict(linear=linear_probe, knn=nearest_neighbours)[s.probe](
        train[read], labels[read], test.nan_to_num(), len(names))
    right = scores.argmax(dim=1) == torch.tensor([label for _, label in tests])
    top1 = 100 * float((right & ~test.isnan().any(dim=1)).float().mean())
    cmaev.print0(f"{s.probe} probe of {s.init}: top-1 {top1:.2f} % of {len(tests)} videos, {len(videos)} labels "
                 f"(chance {100 / len(names):.2f} %)")


def pooled_features(s, encoder, videos, score, device):
    """Mean of an encoder's tokens over all test views of each video -> float32 [M, D]; NaN where it cannot be read."""
    encoder.to(device).eval()
    (frames, side, _), (tubelet, patch, _) = encoder.grid, encoder.cube
    clips = LabelledClips(videos, frames * tubelet, s.rate, side * patch, s.sampling, segments=s.segments,
                          crops=s.crops)
    cmaev.print0(f"features of {len(videos)} videos, {s.segments} x {s.crops} views each")
    return score(lambda clips: encoder(clips).mean(dim=1), clips)


def write_features(s, score, device):
    """Writes --features: the features of the videos of --data, their paths, and their labels (-1: none)."""
    if s.init == "none":
        raise cmaev.CMAEVError("--features: give --init, the weights of an encoder")
    if os.path.isdir(s.features) or not os.access(os.path.dirname(s.features) or ".", os.W_OK):
        raise cmaev.CMAEVError(f"--features {s.features} cannot be written: give a file in an existing folder")
    videos = cmaev.read_list(s.data)
    labels = [-1 if label is None else label for _, label in videos]
    if max(map(abs, labels)) >= 2**63:
        raise cmaev.CMAEVError(f"{s.data}: label {max(labels, key=abs)} takes more than 64 bits: renumber")
    features = pooled_features(s, cmaev.load_encoder(s.init), videos, score, device)
    if cmaev.this_rank() == 0:
        with cmaev.atomic_write(s.features, "wb") as file:
            np.savez(file, features=features.numpy(), paths=np.array([path for path, _ in videos]),
                     labels=np.array(labels))
    unreadable = int(features.isnan().any(dim=1).sum())
    cmaev.print0(f"{s.features}: features {list(features.shape)}, paths, labels; {unreadable} videos could not be read")


if __name__ == "__main__":
    cmaev.run_script(main)
