"""Forms of ConvViT's depthwise 5 x 5 x 5 convolution, each in place of cmaev.ConvBlock.depthwise_conv.

A form takes (block, x [B, N_v, s, s, C], grid, visible or None) and returns a tensor like x.
"""

import functools

import cmaev
import torch
import torch.nn.functional as F

OURS = cmaev.ConvBlock.depthwise_conv


def windows(block, x, grid, visible):
    """Matrix products in windows around the visible tubes, or around all."""
    if visible is None:
        visible = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    return OURS(block, x, grid, visible)


def on_map(convolve):
    """Makes a form from convolve(map [B, C, T', H' s, W' s], weight [C, 1, 5, 5, 5], bias [C]) -> map."""
    @functools.wraps(convolve)
    def form(block, x, grid, visible):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
            whole = cmaev.tokens_to_map(x.to(dtype), grid, visible)  # channels-last in memory
            whole = convolve(whole, block.depthwise.weight.to(dtype), block.depthwise.bias.to(dtype))
            x = cmaev.map_to_tokens(whole, grid)
            return x if visible is None else cmaev.gather_tokens(x, visible)
    return form


@on_map
def conv3d(x, weight, bias):
    """One 3-D convolution, channels last."""
    return F.conv3d(x, weight, bias, padding=2, groups=x.shape[1])


@on_map
def conv3d_contiguous(x, weight, bias):
    """One 3-D convolution, channels first: on CUDA PyTorch's own kernel, not cuDNN's."""
    return F.conv3d(x.contiguous(), weight, bias, padding=2, groups=x.shape[1])


def shifted_conv2d(x, weight, bias, memory_format):
    """A 2-D convolution per temporal tap; the results are shifted by -2 to 2 time steps and summed."""
    channels, frames = x.shape[1:3]
    images = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=memory_format)
    conv = lambda i: F.conv2d(images, weight[:, :, i], bias if i == 2 else None, padding=2, groups=channels)
    tap = lambda i: conv(i).unflatten(0, (-1, frames))  # [B, T', C, H, W]
    out = tap(2)
    for i in (0, 1, 3, 4):
        later, earlier = max(2 - i, 0), max(i - 2, 0)
        if later + earlier < frames:
            out[:, later:frames - earlier] += tap(i)[:, earlier:frames - later]
    return out.transpose(1, 2)


@on_map
def conv2d(x, weight, bias):
    """Five 2-D convolutions, channels last."""
    return shifted_conv2d(x, weight, bias, torch.channels_last)


@on_map
def conv2d_contiguous(x, weight, bias):
    """Five 2-D convolutions, channels first: on CUDA PyTorch's own kernel, which has a 5 x 5 variant."""
    return shifted_conv2d(x, weight, bias, torch.contiguous_format)


@on_map
def time_as_channels(x, weight, bias):
    """One 2-D convolution in groups of T' channels, the time steps: T' / 5 times the products."""
    channels, frames = x.shape[1:3]
    steps = torch.arange(frames, device=x.device)
    taps = F.pad(weight[:, 0], (0, 0, 0, 0, frames, frames))  # zero for time steps out of a kernel's reach
    band = taps[:, steps - steps[:, None] + frames + 2].flatten(0, 1)  # [C T' out, T' in, 5, 5]
    images = x.flatten(1, 2).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(images, band, bias.repeat_interleave(frames), padding=2, groups=channels)
    return out.unflatten(1, (channels, frames))


@on_map
def triton(x, weight, bias):
    """Kernels of our own: experiments/triton_depthwise.py."""
    from experiments.triton_depthwise import Convolution
    taps = weight[:, 0].movedim(0, -1)  # [5, 5, 5, C]
    return (Convolution.apply(x.movedim(1, -1), taps) + bias).movedim(-1, 1)


FORMS = {form.__name__: form for form in (
    windows, conv3d, conv3d_contiguous, conv2d, conv2d_contiguous, time_as_channels, triton)}
