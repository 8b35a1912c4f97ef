"""The method on one clip, step by step: python -m pytest tools/test_one_clip.py"""

import json
import os
import re
import sys

import numpy as np
import pytest

import cmaev
import pretrain
from tools import demo_videos, one_clip

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities"),  # of read_image
              pytest.mark.filterwarnings("ignore:Unable to enable fault handler")]  # pytest has taken stderr


@pytest.fixture
def run(monkeypatch, capsys):
    """A script's main in this process -> what it prints."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        cmaev.run_script(script.main)
        return capsys.readouterr().out
    return run


@pytest.fixture
def video(tmp_path, monkeypatch):
    """A video in the working folder, and a small encoder as vit_small."""
    monkeypatch.chdir(tmp_path)
    small = cmaev.VisionTransformer, dict(width=64, depth=2, heads=2)
    monkeypatch.setitem(cmaev.ENCODERS, "vit_small", small)
    demo_videos.write_video("clip.mp4", demo_videos.demo_video(0, np.random.default_rng(0), "motions"))
    return "clip.mp4"


def values_of(output):
    return dict(re.findall(r"(eq\. \d).*?  +(-?\d+\.\d+)", output))


@pytest.mark.parametrize("weight, equations", [(0.14, [1, 2, 3, 4, 5, 6, 7, 8]), (0, [1, 2, 6, 7, 8])])
def test_steps_of_a_trained_run(video, tmp_path, run, weight, equations):
    """Each equation's value, and a picture of four rows."""
    (tmp_path / "list.txt").write_text(4 * "clip.mp4\n")
    run(pretrain, *f"""--recipe demo --encoder vit_small --frames 4 --size 32 --data list.txt --epochs 1
        --warmup-epochs 0 --batch-size 4 --amp none --workers 0 --contrast-weight {weight} --out run""".split())
    output = run(one_clip, video, "run")
    values = values_of(output)
    assert list(values) == [f"eq. {i}" for i in equations]
    contrast = float(values.get("eq. 5", 0))
    assert float(values["eq. 8"]) == pytest.approx(float(values["eq. 7"]) + weight * contrast, abs=2e-3)
    losses = cmaev.read_log("run")[0]
    assert float(values["eq. 7"]) == pytest.approx(losses["reconstruction"], abs=0.2)
    assert "run/clip.png, rows: online" in output and "reconstruction" in output.splitlines()[-1]
    assert cmaev.read_image("run/clip.png").shape == (2 + 4 * 34, 2 + 4 * 34, 3)


def test_steps_with_random_weights(video, run):
    """Of 16 frames of 112 x 112: a tenth of 8 x 14 x 14 tokens is visible."""
    output = run(one_clip, video)
    assert len(values_of(output)) == 8 and "[4, 160, 64]" in output
    assert sorted(os.listdir()) == ["clip.mp4", "clip.png"]


@pytest.mark.parametrize("arguments, words", {
    "": "give a video", "--help": "give a video", "text.mp4": "cannot be opened as a video",
    "clip.mp4 nowhere": "is not a run of pretrain.py",
    "clip.mp4 tuned": "is a run of finetune.py, from --init runs/a: give a run"}.items())
def test_wrong_input_ends_in_one_line(video, tmp_path, run, arguments, words):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "tuned").mkdir()
    settings = dict(settings=dict(layer_decay=0.75, init="runs/a"))
    (tmp_path / "tuned" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=f"^error: .*{words}.*$"):
        run(one_clip, *arguments.split())
