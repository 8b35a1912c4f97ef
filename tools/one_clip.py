"""Prints each step of the method on four clips of a video, and draws the first.

    python -m tools.one_clip clip.mp4 [runs/pretrain-demo]

Without a run of pretrain.py, the weights are random.
"""

import argparse
import math
import sys
from pathlib import Path

import cmaev

import torch
import torch.nn.functional as F
from torchvision.utils import save_image


def main():
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        raise cmaev.CMAEVError("give a video and, if there is one, a run: python -m tools.one_clip clip.mp4 "
                               "runs/pretrain-demo")
    path, run = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    s = argparse.Namespace(encoder="vit_small", contrast_weight=0.14, temperature=0.07, fusion=True,
                           mask_ratio=0.9, frames=16, size=112, tubelet=2, patch=8, rate=4, max_shift=8)
    if run and not Path(run, "settings.json").exists():
        raise cmaev.CMAEVError(f"{run} is not a run of pretrain.py: it has no settings.json")
    if run:
        vars(s).update(cmaev.parse_json(Path(run, "settings.json").read_bytes(), run, "settings")["settings"])
    if hasattr(s, "layer_decay"):
        raise cmaev.CMAEVError(f"{run} is a run of finetune.py, from --init {s.init}: give a run of "
                               "pretrain.py")
    torch.manual_seed(0)
    model = cmaev.CMAEV(s.encoder, s.contrast_weight, s.temperature, fusion=s.fusion, frames=s.frames,
                        size=s.size, tubelet=s.tubelet, patch=s.patch)
    if run:
        cmaev.load_weights(model, cmaev.load_tensors(Path(run, "checkpoint.pt"))["model"], run)

    length, sampling = len(cmaev.Video(path)), (s.frames, s.rate, s.max_shift)
    with cmaev.seeded(0, 0, 0) as generator:  # PretrainClips draws the same
        both = cmaev.temporal_shift_indices(length, *sampling, generator)
        for view, indices in zip(("online", "target"), both):
            print(f"{view} view, frames of {length}: {indices.tolist()}")
    clips = cmaev.PretrainClips([(path, None)], model.encoder.grid, *sampling, s.size, s.mask_ratio, repeats=4)
    sample = clips[0, 0]
    online, mask = cmaev.normalize(sample["online"]), sample["mask"]
    target = cmaev.normalize(cmaev.augment_colors(sample["target"], sample["colors"]))
    visible, masked = cmaev.visible_and_masked(mask)
    with torch.no_grad():
        losses, tokens = model(online, target, mask), model.encoder(online, visible)
        steps = {"online clips": online, "target clips, coloured": target, "mask (1: masked)": mask.float(),
                 "eq. 1  visible tokens": tokens, "eq. 2  online features": losses["feature"]}
        if s.contrast_weight:  # else there is no target branch
            target_feature = model.target_encoder(target).mean(dim=1)
            query = model.predictor(model.projector(losses["feature"]))
            key = model.target_projector(target_feature)
            steps |= {"eq. 3  target features": target_feature,
                      "eq. 4  cosine similarities": F.normalize(query) @ F.normalize(key).T,
                      "eq. 5  L_c of these four clips": losses["contrast"]}
        steps |= {"eq. 6  predicted cubes": model.decoder(tokens, visible, masked),
                  "eq. 7  L_r": losses["reconstruction"],
                  f"eq. 8  L_r + {s.contrast_weight} L_c": losses["loss"]}
    print(f"{'':<32}  mean +- standard deviation  [shape]")
    for name, x in steps.items():
        spread = f" +- {x.std():.3f}  {list(x.shape)}" if x.ndim else ""
        print(f"{name:<32}{x.mean():6.3f}{spread}")
    original, hidden, _, filled = model.reconstruct(online[:1], mask[:1])
    rows = [original, hidden, cmaev.to_unit_range(target[:1])]
    titles = "online frames; masked; target frames"
    if run:
        rows, titles = [*rows, filled], f"{titles}; reconstruction"
    frames = torch.cat(rows).transpose(1, 2)[:, ::math.ceil(s.frames / 8)]
    picture = Path(run or "", f"{Path(path).stem}.png")
    save_image(frames.flatten(0, 1), picture, nrow=frames.shape[1])
    print(f"{picture}, rows: {titles}")


if __name__ == "__main__":
    cmaev.run_script(main)
