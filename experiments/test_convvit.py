"""Forms of the depthwise convolution against a float64 loop: python -m pytest experiments/test_convvit.py"""

import itertools
import os
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in test_cmaev.py: torch reads it once
import torch

import cmaev
from experiments.depthwise import FORMS

INTERPRETED = "TRITON_INTERPRET" in os.environ


def slow_depthwise(x, weight, bias, grid, visible):
    """Tap by tap, on maps with a border of zeros: x [B, N_v, s, s, C] of the visible tokens -> the same."""
    (t, h, w), (_, _, s, _, channels) = grid, x.shape
    at = lambda token: (slice(token // (h * w) + 2, token // (h * w) + 3),
                        slice(token // w % h * s + 2, token // w % h * s + s + 2),
                        slice(token % w * s + 2, token % w * s + s + 2))
    clips = []
    for clip, tokens in zip(x, visible.tolist()):
        padded = clip.new_zeros(t + 4, h * s + 4, w * s + 4, channels)
        for features, token in zip(clip, tokens):
            padded[at(token)] = features
        out = torch.zeros_like(padded) + bias
        for i, j, k in itertools.product(range(5), repeat=3):
            out[2:-2, 2:-2, 2:-2] += weight[:, 0, i, j, k] * padded[i:i + t, j:j + h * s, k:k + w * s]
        clips.append(torch.stack([out[at(token)][0] for token in tokens]))
    return torch.stack(clips)


def assert_equals_the_loop(name, masked, grid, side, channels, dtype=torch.float32, batch=2):
    torch.manual_seed(0)
    block, tokens = cmaev.ConvBlock(channels), grid[0] * grid[1] * grid[2]
    every = torch.arange(tokens).expand(batch, -1)
    visible = cmaev.visible_and_masked(cmaev.tube_mask(batch, grid, 0.5))[0] if masked else every
    x = torch.randn(*visible.shape, side, side, channels).to(dtype)
    inputs = [x.requires_grad_(), block.depthwise.weight, block.depthwise.bias]
    exact = [y.detach().double().requires_grad_() for y in inputs]
    out = FORMS[name](block, x, grid, visible if masked else None)
    expected = slow_depthwise(*exact, grid, visible)
    grad = torch.randn_like(out)
    results = out, *torch.autograd.grad(out, inputs, grad)
    expecteds = expected, *torch.autograd.grad(expected, exact, grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # a rounding of the result
    for result, expected in zip(results, expecteds, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("name", [name for name in FORMS if name != "triton"])
def test_forms_equal_the_loop(name, masked, dtype):
    for grid, side in (((8, 3, 2), 2), ((2, 2, 3), 4), ((1, 2, 2), 2)):  # a kernel reaches two steps
        assert_equals_the_loop(name, masked, grid, side, channels=6, dtype=dtype)


@pytest.mark.skipif(not INTERPRETED, reason="the next test runs it in Triton's interpreter")
def test_in_the_interpreter():
    assert_equals_the_loop("triton", True, (3, 1, 2), side=2, channels=3, batch=1)
    assert_equals_the_loop("triton", False, (1, 3, 6), side=2, channels=3)  # several programs per clip
    assert_equals_the_loop("triton", False, (1, 1, 1), side=2, channels=33, batch=1)  # and per position


@pytest.mark.skipif(INTERPRETED, reason="runs the test before")
@pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 pytest")
def test_triton_equals_the_loop():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_in_the_interpreter"]
    assert "1 passed" in subprocess.run(command, env=environment, capture_output=True, text=True).stdout
