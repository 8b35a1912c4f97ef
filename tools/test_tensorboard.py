"""A run's log for TensorBoard: python -m pytest tools/test_tensorboard.py"""

import json
import sys

import pytest
import torch
from torchvision.utils import save_image

import cmaev


def test_scalars_and_pictures_of_a_log(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tools import tensorboard
    log = [dict(step=step, reconstruction=1 / step) for step in (1, 4, 8)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    save_image(torch.zeros(3, 9, 9), tmp_path / "reconstruction-000004.png")
    monkeypatch.setattr(sys, "argv", ["tensorboard", str(tmp_path), "--once"])
    cmaev.run_script(tensorboard.main)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("reconstruction")]
    assert losses == [(line["step"], pytest.approx(line["reconstruction"])) for line in log]
    assert [event.step for event in events.Images("reconstruction")] == [4]
