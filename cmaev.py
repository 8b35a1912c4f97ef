"""CMAE-V: contrastive masked autoencoders for video, in one module (arXiv 2301.06018).

Read it beside the paper, from top to bottom. The method comes first; files, weights and training follow:

     1  tokens and tube mask   cuts clips into cubes; masks 90 % of the tokens
     2  encoders               ViT and ConvViT: encoder(clip, visible) -> tokens
     3  decoder and heads      pixel decoder; projector and predictor with global batch statistics
     4  losses                 equations 4, 5 and 7
     5  CMAE-V                 equations 1 to 8 in `CMAEV.forward`; the momentum step
     6  the two views          temporal shift, crop, colours; the dataset
     7  video files            frame-accurate reading of video files and frame folders; list files
     8  weights                loads this project's, VideoMAE's and Hugging Face's weights; saves an encoder
     9  training               what the scripts share: settings, ranks, AMP, schedule, step, checkpoint, log

Each number is marked with its source: the paper or public code of [VideoMAE], [CMAE], [ConvMAE], ...; [choice]:
ours, where none of them gives a value.
Shapes: B clips, T frames, H x W pixels; N tokens, N_v visible, N_m masked; D encoder width; grid (T', H', W').
A cube is the pixels of one token: tubelet frames x patch x patch pixels. A tube is all tokens at one position.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
import weakref
import zipfile
from bisect import bisect_left, bisect_right
from collections import Counter
from copy import deepcopy
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting OpenMP threads sleep, not spin

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.sidedata.sidedata import SideDataContainer, Type as SideDataType
from torch import nn
from torch.distributed.elastic.multiprocessing import errors as elastic_errors
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in VideoMAE


class CMAEVError(ValueError):
    """An error that the user can fix. Its one-line message says what is wrong, where, and how to fix it."""


class BadVideo(CMAEVError):
    """A video that cannot be read. Training replaces it with another video."""


def print0(*values):
    """Prints on rank 0."""
    if this_rank() == 0:
        print(*values, flush=True)


def seed_of(*key):
    """Hashes non-negative integers to a 64-bit seed. (1,) and (1, 0) give the same seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def seeded(*key):
    """Seeds torch's global CPU generator from the integers `key` inside the block; restores it at the end.

    draw_colors and torchvision's random transforms draw from the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))
        yield torch.default_generator


# 1  Tokens and tube mask ------------------------------------------------------------------------------------

def normalize(clips):
    """Normalises by ImageNet's mean and std: [B, T, 3, H, W] in 0..255 -> float32 [B, 3, T, H, W]."""
    if clips.ndim != 5 or clips.shape[2] != 3:
        raise CMAEVError(f"clips are {list(clips.shape)}, normalize takes [B, T, 3, H, W]: give the frames "
                         "[T, H, W, 3] of Video.read as frames[None].movedim(-1, 2)")
    return torch.stack([(x / 255 - mean) / std for x, mean, std in zip(clips.unbind(2), MEAN, STD)], dim=1)


def to_unit_range(clips):
    """Undoes the mean and std of `normalize`: [B, 3, T, H, W] -> the same shape in [0, 1]."""
    return torch.stack([x * std + mean for x, mean, std in zip(clips.unbind(1), MEAN, STD)], dim=1)


def token_grid(frames, size, tubelet, patch):
    """Returns the token grid (T', H', W') of a clip. `size`: H = W as an int, or (H, W)."""
    height, width = (size, size) if isinstance(size, int) else size
    if frames % tubelet or height % patch or width % patch:
        raise CMAEVError(f"a clip of {frames} frames of {height}x{width} pixels does not divide into cubes "
                         f"of {tubelet} frames of {patch}x{patch}: give frames and size that divide")
    return frames // tubelet, height // patch, width // patch


def cubes(clip, grid, indices=None):
    """Cuts a clip into cubes, one per token: [B, 3, T, H, W] -> [B, N, values], in order (t, h, w, channel).

    If token indices [B, K] are given, returns only those cubes: [B, K, values].
    """
    t, h, w = grid
    frames, height, width = clip.shape[2:]
    x = clip.reshape(-1, 3, t, frames // t, h, height // h, w, width // w).permute(0, 2, 4, 6, 3, 5, 7, 1)
    if indices is None:
        return x.flatten(4).flatten(1, 3)
    batch = torch.arange(len(clip), device=clip.device)[:, None]
    return x[batch, indices // (h * w), indices // w % h, indices % w].flatten(2)


def uncubes(x, grid, size):
    """The inverse of `cubes`: [B, N, values] -> [B, 3, T, H, W], size (T, H, W)."""
    t, h, w = grid
    frames, height, width = size
    x = x.reshape(-1, t, h, w, frames // t, height // h, width // w, 3)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, 3, frames, height, width)


def tube_mask(batch, grid, ratio, generator=None):
    """Draws one spatial mask per clip, repeated over time [VideoMAE] -> bool [batch, N], True = masked.

    `grid` is the encoder's (T', H', W'). int(ratio * H' * W') of the H' * W' positions are masked.
    """
    num_positions = grid[1] * grid[2]
    num_masked = int(ratio * num_positions)
    if not 0 < num_masked < num_positions:
        raise CMAEVError(f"mask ratio {ratio} masks {num_masked} of {num_positions} positions: give another")
    ranks = torch.rand(batch, num_positions, generator=generator).argsort(dim=1).argsort(dim=1)
    return (ranks < num_masked).repeat(1, grid[0])


@torch.compiler.disable
def visible_and_masked(mask, device=None):
    """Indices of the visible [B, N_v] and the masked [B, N_m] tokens of a bool mask [B, N]: int64, ascending.

    Keep the mask on the CPU: then neither the count nor the copy to `device` needs a synchronisation.
    """
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1 or not 0 < counts[0] < mask.shape[1]:
        raise CMAEVError(f"masks hide {min(counts)} to {max(counts)} of {mask.shape[1]} tokens: every clip "
                         "of a batch must hide the same number, neither none nor all")
    indices = mask.byte().argsort(dim=1, stable=True)
    if device is not None and device.type == "cuda" and not mask.is_cuda:
        indices = indices.pin_memory()
    indices = indices.to(device or mask.device, non_blocking=True)
    return indices.split([mask.shape[1] - counts[0], counts[0]], dim=1)


def gather_tokens(tokens, indices):
    """Selects tokens by index: [B, N, ...], [B, K] -> [B, K, ...]."""
    indices = indices.view(*indices.shape, *[1] * (tokens.ndim - 2))
    return tokens.gather(1, indices.expand(-1, -1, *tokens.shape[2:]))


# 2  Encoders ------------------------------------------------------------------------------------------------

def sincos_table(tokens, width):
    """VideoMAE's fixed sine-cosine embedding of the flattened token index -> float32 [1, tokens, width].

    Channel j of position n is sin (j even) or cos (j odd) of n / 10000^(2 (j // 2) / width).
    """
    n, j = np.arange(tokens)[:, None], np.arange(width)[None]
    angle = n / 10000 ** (2 * (j // 2) / width)
    return torch.from_numpy(np.where(j % 2, np.cos(angle), np.sin(angle))).float()[None]


class CubeEmbed(nn.Module):
    """Patch embedding: cubes [..., values] -> [..., width].

    One matrix product equals a Conv3d with stride = kernel size, whose weight VideoMAE's files hold.
    """

    def __init__(self, width, cube):
        super().__init__()
        self.proj = nn.Conv3d(3, width, cube, stride=cube)

    def forward(self, x):
        return F.linear(x, self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] -> [B, N, D]. The key bias has no effect; VideoMAE has none."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU, Linear; hidden width 4 * width."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, D] -> [B, N, D]. `drop_path`: rate of stochastic depth, per clip."""

    def __init__(self, width, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(module):
    """Xavier-uniform matrices and zero biases [VideoMAE]."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """Base class. encoder(clip [B, 3, T, H, W], visible=None) -> tokens [B, N_v, D].

    `visible`: the indices int64 [B, N_v] that visible_and_masked gives; without it all N tokens, in the order
    (time, row, column). Raises CMAEVError for a clip or indices of another shape or type.
    To add an encoder, write a subclass with `forward` and `layers`, and add it to ENCODERS.
    """

    def __init__(self, width, frames, size, tubelet, patch, heads=None):
        super().__init__()
        self.width, self.heads, self.cube = width, heads, (tubelet, patch, patch)
        self.grid = token_grid(frames, size, tubelet, patch)
        self.register_buffer("positions", sincos_table(math.prod(self.grid), width), persistent=False)

    def check_mask(self, mask):
        """Raises CMAEVError unless the mask is bool [B, N]."""
        tokens = math.prod(self.grid)
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != tokens:
            raise CMAEVError(f"mask is {mask.dtype} {list(mask.shape)}, not bool [B, N], N = {tokens}")

    def visible_cubes(self, clip, visible=None):
        """Returns the visible tokens' cubes [B, N_v, values] and position embedding [B, N_v, D]."""
        shape = [len(clip), 3, *(n * side for n, side in zip(self.grid, self.cube))]
        if list(clip.shape) != shape or not clip.is_floating_point():
            raise CMAEVError(f"clip [B, 3, T, H, W] is {clip.dtype} {list(clip.shape)}, the encoder takes "
                             f"float32 {shape}: give normalize(clips) of clips [B, T, 3, H, W]")
        positions = self.positions.expand(len(clip), -1, -1)
        if visible is not None:
            if visible.dtype != torch.int64 or visible.ndim != 2 or len(visible) != len(clip):
                raise CMAEVError(f"visible is {visible.dtype} {list(visible.shape)}, the encoder takes int64 "
                                 f"[{len(clip)}, N_v]: give the indices of visible_and_masked(mask)")
            positions = gather_tokens(positions, visible)
        return cubes(clip, self.grid, visible), positions


class VisionTransformer(Encoder):
    """VideoMAE's ViT: cube embedding, fixed positions, pre-norm blocks; no class token."""

    def __init__(self, width, depth, heads, frames=16, size=224, tubelet=2, patch=16, drop_path=0.0):
        super().__init__(width, frames, size, tubelet, patch, heads)
        self.patch_embed = CubeEmbed(width, self.cube)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))  # as one matrix [MAE]
        rates = np.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)

    def forward(self, clip, visible=None):
        x, positions = self.visible_cubes(clip, visible)
        x = self.patch_embed(x) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def layers(self):
        """Returns the layers of layer-wise learning-rate decay, from input to output [VideoMAE]."""
        return [self.patch_embed, *self.blocks]


# In ConvViT's stages 1 and 2 each token has an s x s feature map, [B, N_v, s, s, C]: s = 4, then 2

def tokens_to_map(x, grid, visible=None):
    """Scatters the visible tokens' features into the dense map: [B, N_v, s, s, C] -> [B, C, T', H' s, W' s].

    The rest is zero. Channels-last in memory: oneDNN's depthwise convolution is three times as fast on it.
    """
    if visible is not None:
        dense = x.new_zeros(x.shape[0], math.prod(grid), *x.shape[2:])
        x = dense.scatter(1, visible[..., None, None, None].expand_as(x), x)
    return x.unflatten(1, grid).transpose(3, 4).flatten(4, 5).flatten(2, 3).movedim(-1, 1)


def map_to_tokens(x, grid):
    """The inverse of `tokens_to_map` without a mask: [B, C, T', H' s, W' s] -> [B, N, s, s, C]."""
    x = x.unflatten(4, (grid[2], -1)).unflatten(3, (grid[1], -1))  # [B, C, T', H', s, W', s]
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(1, 3)


def merge_2x2(x):
    """Joins 2 x 2 neighbouring features of a token: [B, N_v, s, s, C] -> [B, N_v, s / 2, s / 2, 4 C]."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)


def tube_windows(x, grid, visible, border):
    """Returns each visible token's features and a border around them, zero where masked or outside.

    [B, N_v, s, s, C] -> [C, B, T', N_v / T', (s + 2 border)^2].
    """
    batch, side, window = len(x), x.shape[2], x.shape[2] + 2 * border
    tubes = visible[:, :visible.shape[1] // grid[0]]  # the visible tokens' positions in the first time step
    # index map [B, H' s, W' s] of any time step: 1, 2, ... at visible features, 0 at masked ones
    index_map = torch.arange(1, tubes.shape[1] * side**2 + 1, device=x.device).view(1, -1, side, side, 1)
    index_map = tokens_to_map(index_map.expand(batch, -1, -1, -1, -1), (1, *grid[1:]), tubes)[:, 0, 0]
    # its windows around the visible tokens [B, (N_v / T') window^2]
    indices = F.pad(index_map, 4 * (border,)).unfold(1, window, side).unfold(2, window, side).flatten(1, 2)
    indices = gather_tokens(indices, tubes).flatten(1)
    # the features at these indices, at each time step; index 0 is a zero put in front of them
    features = F.pad(x.unflatten(1, (grid[0], -1)).movedim(-1, 0).flatten(3), (1, 0))
    indices = indices[None, :, None].expand(*features.shape[:3], -1)  # [C, B, T', (N_v / T') window^2]
    return features.gather(3, indices).unflatten(3, (-1, window**2))


class ConvBlock(nn.Module):
    """ConvMAE's masked convolution block on the features of visible tokens: [B, N_v, s, s, C] -> the same.

    Only the depthwise convolution mixes positions. It sees zeros at masked tokens.
    """

    def __init__(self, width, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.conv1 = nn.Linear(width, width)
        self.depthwise = nn.Conv3d(width, width, 5, padding=2, groups=width)
        self.conv2 = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def depthwise_conv(self, x, grid, visible):
        """The depthwise 5 x 5 x 5 convolution at the visible tokens: [B, N_v, s, s, C] -> the same.

        Equals map_to_tokens(depthwise(tokens_to_map(x, grid, visible)), grid) at the visible tokens, and computes
        no others: at 90 % masking 10 to 20 times as fast on a CPU. Per channel, one matrix
        [(s + 4)^2, 5 s^2] applies the kernel's 5 temporal taps to a window. Row k is their result for a window that
        is 1 at pixel k and 0 elsewhere. Each tap's result is then shifted in time; all are summed.
        """
        with torch.autocast("cpu", enabled=False):
            x = x.float() if x.device.type == "cpu" else x  # oneDNN's bf16 gradient: wrong if grid[0] < 5
            if visible is None:
                return map_to_tokens(self.depthwise(tokens_to_map(x, grid)), grid)
            batch, side, channels = len(x), x.shape[2], x.shape[4]
            pixels = (side + 4) ** 2  # of a window
            windows = tube_windows(x, grid, visible, border=2)
            images = torch.eye(pixels, device=x.device).view(-1, 1, side + 4, side + 4)  # one-hot
            matrices = F.conv2d(images, self.depthwise.weight.view(-1, 1, 5, 5)).view(pixels, channels, -1)
            taps = windows.flatten(1, 3) @ matrices.transpose(0, 1)  # [C, B N_v, 5 s^2]
            taps = taps.view(channels, batch, grid[0], -1, 5, side, side).unbind(4)
            shifted = [F.pad(tap, (0, 0, 0, 0, 0, 0, 2 - i, i - 2))  # by 2 - i time steps, if within the clip
                       for i, tap in enumerate(taps) if abs(2 - i) < grid[0]]
            return sum(shifted).flatten(2, 3).movedim(0, -1) + self.depthwise.bias

    def forward(self, x, grid, visible):
        x = x + self.drop_path(self.conv2(self.depthwise_conv(self.conv1(self.norm1(x)), grid, visible)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvViT(Encoder):
    """ConvMAE's hybrid encoder for video: two stages of masked convolutions, then ViT blocks.

    `visible` must be indices of a tube mask. Each patch embedding acts inside one token: a matrix product.
    For video [choice]: the first embedding spans the tubelet's frames; depthwise kernels are 5 x 5 x 5; grid
    and position embedding are the ViT's. `fusion` adds stages 1 and 2 to stage 3's output, as in ConvMAE's
    pre-training. Fine-tuning goes without it.
    """

    def __init__(self, widths, depths, heads, frames=16, size=224, tubelet=2, patch=16, fusion=True,
                 drop_path=0.0):
        super().__init__(widths[2], frames, size, tubelet, patch, heads)
        if patch % 4:
            raise CMAEVError(f"patch size {patch}: ConvViT needs a multiple of 4")
        self.patch_embed1 = CubeEmbed(widths[0], (tubelet, patch // 4, patch // 4))
        self.patch_embed2 = nn.Linear(4 * widths[0], widths[1])
        self.patch_embed3 = nn.Linear(4 * widths[1], widths[2])
        self.patch_embed4 = nn.Linear(widths[2], widths[2])
        self.embed_norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for width in widths)
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        self.blocks1 = nn.ModuleList(ConvBlock(widths[0], next(rates)) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(widths[1], next(rates)) for _ in range(depths[1]))
        self.blocks3 = nn.ModuleList(Block(widths[2], heads, next(rates)) for _ in range(depths[2]))
        self.fusion1 = nn.Linear(16 * widths[0], widths[2]) if fusion else None
        self.fusion2 = nn.Linear(4 * widths[1], widths[2]) if fusion else None
        self.norm = nn.LayerNorm(widths[2], eps=1e-6)
        for module in (self.patch_embed3, self.patch_embed4, self.blocks3):
            module.apply(init_weights)  # the others are convolutions in ConvMAE: PyTorch's initialisation

    def forward(self, clip, visible=None):
        x, positions = self.visible_cubes(clip, visible)
        tubelet, patch, _ = self.cube
        x = x.unflatten(-1, (tubelet, 4, patch // 4, 4, patch // 4, 3))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)  # [B, N_v, 4, 4, values]

        stage1 = F.gelu(self.embed_norms[0](self.patch_embed1(x)))  # [B, N_v, 4, 4, C1]
        for block in self.blocks1:
            stage1 = block(stage1, self.grid, visible)

        stage2 = F.gelu(self.embed_norms[1](self.patch_embed2(merge_2x2(stage1))))  # [B, N_v, 2, 2, C2]
        for block in self.blocks2:
            stage2 = block(stage2, self.grid, visible)

        stage3 = F.gelu(self.embed_norms[2](self.patch_embed3(merge_2x2(stage2)))).flatten(1, 3)
        stage3 = self.patch_embed4(stage3) + positions  # [B, N_v, D]
        for block in self.blocks3:
            stage3 = block(stage3)

        if self.fusion1 is not None:
            stage3 = stage3 + self.fusion1(stage1.flatten(2)) + self.fusion2(stage2.flatten(2))
        return self.norm(stage3)

    @torch.compiler.disable  # it reads the mask's values
    def check_mask(self, mask):
        super().check_mask(mask)
        tubes = mask.unflatten(1, (self.grid[0], -1))
        if (tubes != tubes[:, :1]).any():
            raise CMAEVError("ConvViT needs a tube mask: the same positions masked at every time step")

    def layers(self):
        """As VisionTransformer.layers; stages 1 and 2 and all embeddings are one layer [ConvMAE]."""
        return [nn.ModuleList([self.patch_embed1, self.patch_embed2, self.patch_embed3, self.patch_embed4,
                               self.embed_norms, self.blocks1, self.blocks2]), *self.blocks3]


ENCODERS = {  # name: class, sizes
    "vit_tiny": (VisionTransformer, dict(width=192, depth=6, heads=3)),  # [choice], for the demo
    "vit_small": (VisionTransformer, dict(width=384, depth=12, heads=6)),
    "vit_base": (VisionTransformer, dict(width=768, depth=12, heads=12)),
    "vit_large": (VisionTransformer, dict(width=1024, depth=24, heads=16)),
    "convvit_tiny": (ConvViT, dict(widths=(48, 96, 192), depths=(1, 1, 5), heads=3)),  # [choice]
    "convvit_base": (ConvViT, dict(widths=(256, 384, 768), depths=(2, 2, 11), heads=12)),
}


def build_encoder(name, fusion=True, **geometry):
    """Builds an encoder by name. `fusion`: see ConvViT; `geometry`: frames, size, tubelet, patch, drop_path."""
    if name not in ENCODERS:
        raise CMAEVError(f"no encoder {name!r}: choose from {', '.join(ENCODERS)}")
    encoder, sizes = ENCODERS[name]
    if encoder is ConvViT:
        sizes = sizes | {"fusion": fusion}
    return encoder(**sizes | geometry)


# 3  Decoder and heads ---------------------------------------------------------------------------------------

class PixelDecoder(nn.Module):
    """VideoMAE's decoder: tokens [B, N_v, D], visible [B, N_v], masked [B, N_m] -> cubes [B, N_m, values].

    4 blocks of half the encoder's width, 64 channels per head: VideoMAE's for ViT-S and B; else [choice].
    """

    def __init__(self, encoder, depth=4):
        super().__init__()
        width, values = encoder.width // 2, 3 * math.prod(encoder.cube)
        self.embed = nn.Linear(encoder.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_table(math.prod(encoder.grid), width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)  # [choice] VideoMAE truncates it at one standard deviation
        nn.init.normal_(self.head.weight, std=0.02)  # [choice] predictions start near 0, the loss near 1

    def forward(self, tokens, visible, masked):
        positions = self.positions.expand(len(tokens), -1, -1)
        x = torch.cat([self.embed(tokens) + gather_tokens(positions, visible),
                       self.mask_token + gather_tokens(positions, masked)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -masked.shape[1]:]))  # the masked tokens: I of equation 6


def world_size():
    """Number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank():
    """Number of this rank; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_over_ranks(x):
    """Gathers the rows of all ranks, without gradient: [B, C] -> [B * world, C]."""
    if world_size() == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(rows, x.contiguous())
    return torch.cat(rows)


def sum_over_ranks(x):
    """Sum of a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


class AllReduce(torch.autograd.Function):
    """Sum over ranks, forward and backward, on every backend.

    torch's SyncBatchNorm refuses CPU tensors, and torch.distributed.nn.functional cannot be compiled.
    """

    @staticmethod
    def forward(ctx, x):
        return sum_over_ranks(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad)


class GlobalBatchNorm(nn.Module):
    """Batch norm over the global batch, with the same B on each rank: [B, C] -> [B, C] in float32.

    It keeps no running statistics, as only pre-training uses it. Epsilon is 1e-5 [choice]; CMAE's is 1e-6.
    """

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def mean(self, x):
        x = x.mean(dim=0)
        return AllReduce.apply(x) / world_size() if world_size() > 1 else x

    def forward(self, x):
        centred = x.float() - self.mean(x.float())
        return centred * (self.mean(centred.square()) + 1e-5).rsqrt() * self.weight + self.bias


class ProjectionHead(nn.Sequential):
    """Projector and predictor: Linear, BatchNorm, ReLU, Linear without bias [CMAE]. [B, in] -> [B, out]."""

    def __init__(self, width_in, hidden, width_out):
        super().__init__(nn.Linear(width_in, hidden), GlobalBatchNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, width_out, bias=False))
        self.apply(init_weights)  # [choice] CMAE keeps PyTorch's initialisation


# 4  Losses (float32, also under AMP) ------------------------------------------------------------------------

def standardize(x):
    """Standardises cubes per channel [VideoMAE] -> cubes [..., values], their mean and std [..., 1, 3].

    The variance is unbiased. VideoMAE adds 1e-6 to the std of pixels in [0, 1], which is 1e-6 / STD here.
    """
    pixels = x.unflatten(-1, (-1, 3))
    std, mean = torch.std_mean(pixels, dim=-2, keepdim=True)
    std = torch.stack([s + 1e-6 / scale for s, scale in zip(std.unbind(-1), STD)], dim=-1)
    return ((pixels - mean) / std).flatten(-2), mean, std


def reconstruction_loss(prediction, clip, masked, grid):
    """Equation 7: mean squared error of the predicted and the standardised masked cubes -> float32 scalar.

    prediction [B, N_m, values]; clip [B, 3, T, H, W], normalised; masked indices [B, N_m]; grid (T', H', W').
    """
    return F.mse_loss(prediction.float(), standardize(cubes(clip, grid, masked))[0])


def info_nce(query, key, temperature, video_index=None):
    """Equations 4 and 5: cosine similarity and InfoNCE over the keys of all ranks, with the same B on each.

    query, key [B, C]; row i of both is of one sample; keys of other videos are negatives. `video_index`:
    int64 [B], of each clip's video; without it all clips are from different videos. Returns the loss and the
    share of queries whose most similar key is the positive; float32 scalars.
    """
    query, keys = F.normalize(query.float(), dim=1), gather_over_ranks(F.normalize(key.float(), dim=1))
    with torch.autocast(query.device.type, enabled=False):  # float64: a GPU computes float32 products in TF32
        logits = (query.double() @ keys.double().T).float() / temperature  # [B, B * world]
    positives = torch.arange(len(query), device=query.device) + len(query) * this_rank()
    if video_index is not None:  # other clips of the same video are neither positive nor negative
        same = video_index[:, None] == gather_over_ranks(video_index)
        logits = logits.masked_fill(same.scatter(1, positives[:, None], False), -math.inf)
    return F.cross_entropy(logits, positives), (logits.argmax(dim=1) == positives).float().mean()


# 5  CMAE-V --------------------------------------------------------------------------------------------------

class CMAEV(nn.Module):
    """The whole method. model(online, target, mask) -> a dict of losses.

    online, target: normalised clips [B, 3, T, H, W]; mask: bool [B, N], on the CPU; video_index: see info_nce.
    Returns loss, reconstruction, contrast and accuracy, float32 scalars, and the online feature [B, D].
    pretrain.py applies augment_colors to the target, normalize to both, and calls update_target after each
    optimiser step.
    `contrast_weight` 0 is VideoMAE (ViT) or a video ConvMAE (ConvViT): no target branch is built. With
    target=None the loss is the reconstruction's. `geometry`: see build_encoder.
    """

    def __init__(self, encoder="vit_base", contrast_weight=0.14, temperature=0.07, **geometry):
        super().__init__()
        self.contrast_weight, self.temperature = contrast_weight, temperature
        self.encoder = build_encoder(encoder, **geometry)
        self.decoder = PixelDecoder(self.encoder)
        if contrast_weight:
            width = self.encoder.width
            self.projector = ProjectionHead(width, 2 * width, 256)  # 768 -> 1536 -> 256 [CMAE]
            self.predictor = ProjectionHead(256, 2 * width, 256)
            self.target_encoder = deepcopy(self.encoder).requires_grad_(False)
            self.target_projector = deepcopy(self.projector).requires_grad_(False)

    def forward(self, online, target, mask, video_index=None):
        self.encoder.check_mask(mask)
        visible, masked = visible_and_masked(mask, online.device)  # token indices
        tokens = self.encoder(online, visible)  # equation 1
        prediction = self.decoder(tokens, visible, masked)  # equation 6
        reconstruction = reconstruction_loss(prediction, online, masked, self.encoder.grid)  # equation 7

        feature = tokens.mean(dim=1)  # equation 2 over the visible tokens: no feature decoder (section 3)
        contrast = accuracy = torch.zeros_like(reconstruction)
        if self.contrast_weight and target is not None:
            with torch.no_grad():
                target_feature = self.target_encoder(target).mean(dim=1)  # equation 3
            contrast, accuracy = self.contrastive_loss(feature, target_feature, video_index)  # equations 4 and 5
        loss = reconstruction + self.contrast_weight * contrast  # equation 8
        return dict(loss=loss, reconstruction=reconstruction, contrast=contrast, accuracy=accuracy,
                    feature=feature)

    def contrastive_loss(self, feature, target_feature, video_index=None):
        """Equations 4 and 5: heads and InfoNCE on both views' features [B, D] -> loss, accuracy."""
        if len(feature) * world_size() < 2:
            raise CMAEVError("InfoNCE needs two or more clips in the global batch")
        with torch.no_grad():
            key = self.target_projector(target_feature)
        return info_nce(self.predictor(self.projector(feature)), key, self.temperature, video_index)

    @torch.no_grad()
    def update_target(self, momentum):
        """The momentum (EMA) step: theta_t <- momentum * theta_t + (1 - momentum) * theta_s."""
        if self.contrast_weight:
            theta_t = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
            theta_s = [*self.encoder.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_(theta_t, theta_s, 1 - momentum)

    @torch.no_grad()
    def reconstruct(self, clip, mask):
        """Returns four clips in [0, 1], shaped as the normalised clip [B, 3, T, H, W].

        The original, and three copies with the masked cubes replaced: by ImageNet's mean, by the cube's mean
        colour, by the prediction. The decoder predicts standardised cubes; they get the original cube's mean and
        deviation.
        """
        self.encoder.check_mask(mask)
        visible, masked = visible_and_masked(mask, clip.device)
        prediction = self.decoder(self.encoder(clip, visible), visible, masked).float()
        original = cubes(clip, self.encoder.grid)
        _, mean, std = standardize(gather_tokens(original, masked))
        pixels = prediction.unflatten(-1, (-1, 3))
        indices = masked[..., None].expand_as(prediction)
        fillings = [torch.zeros_like(pixels), mean.expand_as(pixels), pixels * std + mean]
        filled = [original.scatter(1, indices, filling.flatten(-2)) for filling in fillings]
        clips = [uncubes(x, self.encoder.grid, clip.shape[2:]) for x in (original, *filled)]
        return [to_unit_range(x).clamp(0, 1) for x in clips]


# 6  The two views -------------------------------------------------------------------------------------------

def temporal_shift_indices(num_frames, frames, rate, max_shift, generator=None):
    """Draws the frame indices of the two views (paper, section 3) -> (online, target), int64 [frames] each.

    Online: t1 + i * rate, i < frames. Target: the same plus delta, uniform on {0, ..., max_shift}. t1 is uniform
    over all starts at which both views fit. A video that is too short repeats its last frame [VideoMAE].
    """
    if min(num_frames, frames, rate) < 1 or max_shift < 0:
        raise CMAEVError(f"num_frames={num_frames}, frames={frames} and rate={rate} must be 1 or more, and "
                         f"max_shift={max_shift} 0 or more")
    delta = torch.randint(max_shift + 1, (), generator=generator)
    num_starts = num_frames - ((frames - 1) * rate + int(delta))
    t1 = torch.randint(max(num_starts, 1), (), generator=generator)
    online = t1 + rate * torch.arange(frames)
    return online.clamp(max=num_frames - 1), (online + delta).clamp(max=num_frames - 1)


def multi_scale_crop(height, width, generator=None):
    """Draws VideoMAE's multi-scale crop -> (top, left, height, width) in pixels.

    Height and width are the short side times 1, .875, .75 or .66, at most one step apart. The offset is one
    of 13, in quarters of the margin: corners, centre, edge middles, quarter points. [choice] Exact offsets and
    sides. VideoMAE rounds the quarter down, up to 3 pixels from the far edges, and sides of 222 to 226 to 224.
    """
    sides = [int(min(height, width) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sizes = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    offsets = [(y, x) for y in range(5) for x in range(5) if y % 2 == x % 2]  # in quarters of the margin
    h, w = sizes[torch.randint(len(sizes), (), generator=generator)]
    y, x = offsets[torch.randint(len(offsets), (), generator=generator)]
    return (height - h) * y // 4, (width - w) * x // 4, h, w


LUMA = 0.299, 0.587, 0.114  # of red, green and blue


def draw_colors():
    """Draws the target view's colour augmentation of one clip [CMAE] -> float32 [11], see color_parameters.

    ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2, blur of sigma 0.1 to 2 with 0.5.
    """
    brightness = contrast = saturation = torch.ones(())
    hue, sigma = torch.zeros(()), torch.tensor(0.01)  # sigma 0.01: no blur
    if torch.rand(()) < 0.8:
        brightness, contrast, saturation = 1 + 0.4 * (2 * torch.rand(3) - 1)
        hue = 0.1 * (2 * torch.rand(()) - 1)
    if torch.rand(()) < 0.2:
        saturation = torch.zeros(())  # grey
    if torch.rand(()) < 0.5:
        sigma = 0.1 + 1.9 * torch.rand(())
    return color_parameters(brightness, contrast, saturation, hue, sigma)


def color_parameters(brightness, contrast, saturation, hue, sigma):
    """Returns float32 [11]: 3 x 3 colour matrix, weight of the clip's mean luma, the blur's sigma in pixels.

    Takes scalars: torchvision's factors, hue as a fraction of a full turn. All but the blur form one affine
    map, in argument order, clamped once [choice]: hue rotates the IQ plane, contrast mixes in the clip's mean
    luma. torchvision uses a random order, shifts hue in HSV, takes each frame's mean, and clamps after each.
    At a pixel, this hue shift and torchvision's differ about as much as either changes it.
    """
    rgb_to_yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    cos, sin = torch.cos(2 * math.pi * hue), torch.sin(2 * math.pi * hue)
    rotate = torch.tensor([(1, 0, 0), (0, cos, sin), (0, -sin, cos)])  # by -2 pi hue, HSV's direction
    saturate = torch.lerp(torch.tensor(3 * [LUMA]), torch.eye(3), saturation)
    matrix = brightness * contrast * rgb_to_yiq.inverse() @ rotate @ rgb_to_yiq @ saturate
    return torch.cat([matrix.flatten(), torch.stack([brightness * (1 - contrast), sigma])])


def augment_colors(clips, colors):
    """Applies the colours float32 [B, 11] to clips: uint8 [B, T, 3, S, S] -> the same, float32 in 0..255."""
    frames = clips.shape[1]
    matrix, luma_weight, sigma = colors.repeat_interleave(frames, dim=0).split([9, 1, 1], dim=1)  # per frame
    x = clips.flatten(3).float()  # [B, T, 3, S^2]
    luma = sum(weight * mean for weight, mean in zip(LUMA, x.mean(dim=(1, 3)).unbind(1)))  # [B]
    offset = luma_weight * luma.repeat_interleave(frames)[:, None]
    x = torch.baddbmm(offset[..., None], matrix.view(-1, 3, 3), x.flatten(0, 1))
    return blur(x.clamp_(0, 255).view_as(clips), sigma[::frames])


def blur(x, sigma):
    """13-tap Gaussian blur by a matrix product over rows and one over columns: [B, T, 3, S, S], sigma [B, 1].

    At the borders the kernel is renormalised over the pixels inside.
    """
    pixel = torch.arange(x.shape[-1], device=x.device)
    distance = (pixel[:, None] - pixel).abs()
    distance = distance.where(distance <= 6, math.inf)
    matrix = (-(distance / sigma[..., None]).square() / 2).softmax(dim=-1)  # [B, S, S]
    for _ in range(2):
        x = (x.mT.flatten(1, 3) @ matrix.mT).view_as(x)
    return x


def log_bad_video(path, reason, log=None):
    """Prints a bad video and appends it to `log`, a file of JSON lines of all workers, unless it is there."""
    if log:
        start = json.dumps(dict(path=path))[:-1]
        with open(log, "a+", errors="replace") as file:
            file.seek(0)
            if any(line.startswith(start) for line in file):
                return
            print(json.dumps(dict(path=path, reason=reason)), file=file)
    print(f"bad video: {reason}", flush=True)


class VideoClips(Dataset):
    """Base dataset: dataset[epoch, index] -> dict of tensors, a pure function of (seed, epoch, index).

    `videos`: from read_list. A subclass defines sample(video, label, index, generator) -> dict of tensors
    [clips, ...]. A bad video is listed in the file `log`. Another one, drawn from (seed, epoch, index, attempt),
    replaces it: "replaced", bool [clips], is then True. Raises BadVideo after `attempts` bad videos in a row.
    """

    attempts = 10

    def __init__(self, videos, seed=0, log=None):
        path_types = str, os.PathLike
        if isinstance(videos, path_types) or (videos and isinstance(videos[0], path_types)):
            raise CMAEVError(f"videos are {str(videos):.60}, not (path, label) pairs: give read_list(path)")
        self.videos, self.seed, self.log = videos, seed, log

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        if not isinstance(key, tuple) or len(key) != 2 or key[0] < 0 or not 0 <= key[1] < len(self.videos):
            raise CMAEVError(f"no sample {key}: give dataset[epoch, index], epoch from 0, index 0 to "
                             f"{len(self) - 1}, and a DataLoader sampler=[(epoch, index), ...]")
        index, draw = key[1], key
        for attempt in range(1, self.attempts + 1):
            path, label = self.videos[index]
            try:
                sample = self.read_sample(path, label, index, *draw)
                clips = next(iter(sample.values()))  # any of them
                return sample | {"replaced": torch.full((len(clips),), attempt > 1)}
            except BadVideo as error:
                reason = last_line(error)
            log_bad_video(path, reason, self.log)
            draw = *key, attempt
            with seeded(self.seed, *draw) as generator:
                index = int(torch.randint(len(self.videos), (), generator=generator))
        raise BadVideo(f"{self.attempts} videos in a row cannot be read, the last one: {reason}")

    def read_sample(self, path, label, index, *draw):
        """Returns `sample` of a file, drawn from (seed, *draw)."""
        video = Video(path)
        while True:
            length = len(video)
            try:
                with bad_video(path, "cropped and resized"), seeded(self.seed, *draw) as generator:
                    return self.sample(video, label, index, generator)
            except BadVideo:
                if len(video) == length:
                    raise
                # else the read has corrected the file's length: draw again


class PretrainClips(VideoClips):
    """The two views of each video and their tube mask.

    `grid`: the encoder's token grid. `repeats`: clips per opened video, each with its own start, shift, crop
    and mask [mae_st]. dataset[epoch, index], R = repeats, S = size:
        online    uint8 [R, T, 3, S, S]   the view to be masked
        target    uint8 [R, T, 3, S, S]   the shifted view; absent without `two_views`, as are colors and video_index
        colors    float32 [R, 11]         the target's colour augmentation (draw_colors)
        video_index  int64 [R]            of the video in `videos`
        mask      bool [R, N]             True = masked
        replaced  bool [R]                see VideoClips
    """

    def __init__(self, videos, grid, frames=16, rate=4, max_shift=8, size=224, mask_ratio=0.9, repeats=1,
                 seed=0, two_views=True, log=None):
        super().__init__(videos, seed, log)
        tube_mask(1, grid, mask_ratio)  # raises CMAEVError for a ratio that masks nothing or all
        self.grid, self.mask_ratio, self.repeats = grid, mask_ratio, repeats
        self.frames, self.rate, self.max_shift = frames, rate, max_shift
        self.size, self.two_views = size, two_views

    def sample(self, video, label, index, generator):
        clips = []  # the frame indices of each clip's views, one after the other
        for _ in range(self.repeats):
            views = temporal_shift_indices(len(video), self.frames, self.rate, self.max_shift, generator)
            clips.append(torch.cat(views if self.two_views else views[:1]).tolist())
        images = video.frames(sum(clips, []))  # {index: uint8 [H, W, 3]}, decoded in one pass
        pixels = []
        for clip in clips:  # the same crop for both views
            top, left, height, width = multi_scale_crop(*images[clip[0]].shape[:2], generator)
            crops = torch.stack([images[i][top:top + height, left:left + width] for i in clip]).movedim(-1, 1)
            pixels.append(v2.functional.resize(crops, [self.size, self.size], antialias=True))
        pixels = torch.stack(pixels).unflatten(1, (-1, self.frames))  # [R, 2 or 1, T, 3, S, S]
        mask = tube_mask(self.repeats, self.grid, self.mask_ratio, generator)
        sample = dict(online=pixels[:, 0], mask=mask)
        if self.two_views:
            colors = torch.stack([draw_colors() for _ in range(self.repeats)])
            sample |= dict(target=pixels[:, 1], colors=colors,
                           video_index=torch.full((self.repeats,), index))
        return sample


# 7  Video files --------------------------------------------------------------------------------------------

VIDEO_SUFFIXES = set(
    ".mp4 .m4v .mov .qt .3gp .3g2 .f4v .mkv .webm .avi .divx .mpg .mpeg .mpe .m1v .m2v .mpv .vob .ts .mts .m2t .m2ts "
    ".flv .wmv .asf .ogv .ogm .mxf .gif .apng .y4m .mjpeg .mjpg .rm .rmvb .dv .nut .ivf .obu .h264 .264 .hevc .h265 "
    ".265 .wtv".split())
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
CONTAINERS = (  # formats that contain their own frames: no playlists, no references to other files
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,gif,apng,yuv4mpegpipe,mjpeg,jpeg_pipe,mpjpeg,rm,nut,dv,"
    "ivf,obu,h261,h263,h264,hevc,m4v,vc1,dirac,dnxhd,gxf,wtv,nsv,swf,roq,smk,flic,film_cpk,smjpeg")
INDEXED = {"mov", "matroska"}  # formats with a timestamp per frame
SKIPPING = {"h264", "hevc"}  # decoders that can skip frames packet by packet; libdav1d and vp9 cannot
ONE_TO_ONE = {"h264", "hevc", "av1", "vp9", "mjpeg", "prores"}  # codecs with one shown frame per packet
ANY_METADATA = dict(metadata_errors="replace") if int(av.__version__.split(".")[0]) < 19 else {}  # not UTF-8
CONVERTED = {0, 1, 2, 4, 5, 6, 7, 9}  # matrices of H.273 that swscale 9 converts to RGB; 2: none given
SideDataType._missing_ = classmethod(lambda cls, value: cls.PANSCAN)  # else FFmpeg 8.1's types raise
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities")  # see read_image
MAX_PIXELS = 2**26  # of one frame
MAX_BYTES = 2**32  # of the frames of one sample, before they are cropped
MAX_KEPT = 2**27  # pixels of decoded frames that are kept of a file without an index
MAX_SECONDS = 60  # to open a file, and to read from it


def last_line(error):
    """The last line of an error's message, without the traceback that a worker process puts before it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.sub(r"^cmaev\.(CMAEVError|BadVideo): ", "", line)


@contextlib.contextmanager
def bad_video(path, what):
    """Converts library errors inside the block to BadVideo, "path: cannot be {what}: message"."""
    try:
        yield
    except CMAEVError:
        raise
    except (av.error.FFmpegError, OSError, RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        error.__traceback__ = None  # from Python 3.12 on it forms a reference cycle that keeps the file open
        raise BadVideo(f"{path}: cannot be {what}: {last_line(error)}") from None


class Video:
    """The sequence of frames that `ffmpeg -i path` shows.

    `path`: a file, whose best video stream is read, or a folder of JPEG or PNG frames (see frame_files). If a
    file's packets give a frame index that can be trusted, `read` seeks; else it decodes from the start, or reuses
    the frames kept while counting (up to MAX_KEPT pixels). If a read finds that the index has the wrong number of
    frames, it corrects the length and raises BadVideo: draw the indices again.
    Raises BadVideo also if the file cannot be opened, has no frames, or exceeds the limits above.
    """

    images = times = matrix = None

    def __init__(self, path):
        self.path, self.deadline = str(path), time.monotonic() + MAX_SECONDS
        with bad_video(self.path, "opened as a video"):
            if os.path.isdir(path):
                self.images = frame_files(self.path)
                self.length = len(self.images)
            else:
                self._open(fflags="noparse")  # indexed formats need no parser, half of AV1's time
                with contextlib.suppress(av.error.FFmpegError):
                    self._index_packets()
                if not self.times:
                    self._count_frames()
        if self.length == 0:
            raise BadVideo(f"{path}: no frames in it, or too large: give a video or a folder of .jpg or .png")

    def __len__(self):
        return self.length

    def read(self, indices):
        """The frames at `indices` (in [0, len), in any order, repeats allowed) -> uint8 RGB [T, H, W, 3]."""
        frames = self.frames(indices)
        return torch.stack([frames[int(i)] for i in indices])

    def frames(self, indices):
        """The same as a dict {index: uint8 RGB [H, W, 3]}, so that callers can crop before stacking."""
        wanted = sorted({int(i) for i in indices})
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.length:
            raise BadVideo(f"{self.path}: has frames 0 to {self.length - 1}, asked for {wanted or 'none'}")
        self.deadline = time.monotonic() + MAX_SECONDS
        with bad_video(self.path, "decoded"):
            if self.images:
                frames = {i: read_image(self.images[i]) for i in wanted}
            else:
                frames = self._read_file(wanted)
        if len(frames) < len(wanted):
            raise BadVideo(f"{self.path}: frame {wanted[-1]} cannot be decoded: damaged?")
        if len({frame.shape for frame in frames.values()}) > 1:
            raise BadVideo(f"{self.path}: its frames have different sizes: take it off the list")
        return frames

    def _read_file(self, wanted):
        width, height = self.size
        if 3 * width * height * len(wanted) > MAX_BYTES:
            raise ValueError(f"{len(wanted)} frames of {width}x{height} pixels are too large: scale them down")
        if self.times:
            with contextlib.suppress(av.error.FFmpegError):
                frames = self._read_by_seeking(wanted)
                if len(frames) == len(wanted):
                    return frames
            promised = self.length
            self._count_frames()  # the index is wrong
            if self.length != promised:
                raise ValueError(f"has {self.length} frames, not {promised} as in its index: draw again")
        frames = {}
        for i, frame in enumerate(self.kept or self._decode_from_start()):
            if i in wanted:
                frames[i] = self._to_rgb(frame)
            if i == wanted[-1]:
                break
        return frames

    def _open(self, **options):
        if not os.path.isfile(self.path):  # no device, no pipe, no address
            raise ValueError("no such file")
        options |= dict(protocol_whitelist="file", format_whitelist=CONTAINERS)  # no network, no other file
        try:
            self.container = av.open(f"file:{self.path}", container_options=options,
                                     timeout=MAX_SECONDS, **ANY_METADATA)
        except av.error.ArgumentError:
            raise ValueError(f"its format is not allowed: convert it to one of {CONTAINERS}") from None
        weakref.finalize(self, self.container.close)  # reference cycles keep it open
        self.stream = self.container.streams.best("video")
        self.codec = self.stream and self.stream.codec_context
        if self.codec is None:
            raise BadVideo(f"{self.path}: has no video stream that can be decoded: take it off the list")
        self.codec.options = {"max_pixels": str(MAX_PIXELS)}  # larger frames are not decoded
        self.codec.flags |= av.codec.context.Flags.unaligned  # crop to the pixel, as FFmpeg's command line
        self.codec.thread_count = 1  # the loader's workers are the parallelism
        self.margins = container_margins(self.container, self.stream.index)

    def _packets(self):
        for packet in self.container.demux(self.stream):
            if time.monotonic() > self.deadline:
                raise ValueError(f"takes more than {MAX_SECONDS} s to read: cut it, or put it into another "
                                 "container: ffmpeg -i old -c copy new.mp4")
            if packet.size:  # without the empty ones: AVI's dropped frames, and PyAV's final flush packet
                yield packet

    def _index_packets(self):
        """Sets the times of the shown frames and of all key frames, if they can be trusted.

        Conditions [choice]: the format has a timestamp per frame and the codec a frame per packet; no packet is
        damaged; times are distinct and, with B-frames, not in rising order; the first packet is a key frame, the
        decoder shows it (H.264, HEVC), and no frame comes before it. Frames that an edit list discards are ignored.
        """
        codec, packets = self.stream.codec.canonical_name, []
        if self.container.format.name.split(",")[0] not in INDEXED or codec not in ONE_TO_ONE:
            return
        for packet in self._packets():
            if packet.is_corrupt:
                return
            if not packets and codec in SKIPPING:
                copy = av.Packet(bytes(packet))  # without the flag by which an edit list discards it
                shown = self.codec.decode(copy) + self.codec.decode(None)
                if not shown:  # H.264 may begin at a recovery point
                    return
                self.matrix = display_matrix(shown[0])
            packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
        times = [pts for pts, _, _ in packets]
        if not times or None in times or len(set(times)) < len(times):
            return
        if self.codec.has_b_frames and times == sorted(times):  # these are decoding times
            return
        kept = sorted(pts for pts, _, discarded in packets if not discarded)
        if not packets[0][1] or any(pts < times[0] for pts in kept):
            return
        self.times = kept
        self.keys = sorted(pts for pts, key, _ in packets if key)
        self.length, self.size = len(self.times), (self.codec.width, self.codec.height)

    def _read_by_seeking(self, wanted):
        """{index: image} of the wanted frames; fewer at an early end; {} if a frame is damaged or not in the index.

        FFmpeg conceals damage with other frames, some of which are skipped here. Frames that lie close together, or
        in one group of pictures, take one seek and one forward pass. A pass must begin with the key frame, or the
        first kept frame after it; its times must be in the index, rise, and miss no wanted frame.
        """
        key_before = lambda i: self.keys[bisect_right(self.keys, self.times[i]) - 1]
        frames, missing = {}, list(wanted)
        while missing:
            key = key_before(missing[0])
            next_key = min((later for later in self.keys if later > key), default=self.times[-1])
            middle = (key + next_key) // 2  # mp4 searches by decoding time, which differs a little
            self.container.seek(middle, stream=self.stream)
            lowest = highest = bisect_left(self.times, key)  # an edit list may discard the key frame itself
            for frame in self._decode({self.times[i] for i in (lowest, *missing)}):
                i = bisect_left(self.times, frame.pts)
                in_turn = lowest <= i <= highest and self.times[i] == frame.pts
                false_key = frame.pts == key and not frame.key_frame
                same_size = (frame.width, frame.height) == self.size
                if not in_turn or false_key or frame.is_corrupt or not same_size:
                    return {}
                if i == missing[0]:
                    frames[missing.pop(0)] = self._to_rgb(frame)
                if not missing or key_before(missing[0]) > self.times[min(i + 16, self.length - 1)]:
                    break  # a seek pays only beyond a decoder's delay, 16 frames
                lowest, highest = i + 1, missing[0]
            else:
                return frames
            with contextlib.suppress(av.error.EOFError):  # the file's end: all frames have come out
                if any(frame.is_corrupt for frame in self.codec.decode(None)):
                    return {}
        return frames

    def _decode(self, asked):
        """Yields the frames from here to the end. Skips those not in `asked` (times) that no other refers to."""
        codec = self.stream.codec
        for packet in self._packets():
            if codec.canonical_name in SKIPPING:
                self.codec.skip_frame = "DEFAULT" if packet.pts in asked else "NONREF"
            if packet.pts in asked or not codec.intra_only:
                yield from self.codec.decode(packet)
        yield from self.codec.decode(None)

    def _decode_from_start(self):
        """Yields all frames, without damaged ones, as FFmpeg's command line does."""
        self._open()
        with contextlib.suppress(av.error.FFmpegError):  # a truncated file just ends
            for packet in self._packets():
                with contextlib.suppress(av.error.FFmpegError):
                    yield from self.codec.decode(packet)
        with contextlib.suppress(av.error.FFmpegError):
            yield from self.codec.decode(None)

    def _count_frames(self):
        """Counts the frames by decoding them, and keeps them unless they are too large."""
        self.times, self.kept, self.length = None, [], 0
        for frame in self._decode_from_start():
            if self.length == 0:
                self.size, self.matrix = (frame.width, frame.height), display_matrix(frame)
            self.length += 1
            self.kept.append(frame)
            if self.length * frame.width * frame.height > MAX_KEPT:
                self.kept.clear()

    def _to_rgb(self, frame):
        """A decoded frame -> uint8 RGB [H, W, 3], scaled to the first frame, cropped, upright.

        A display matrix of the first frame alone (H.264's message) holds for all.
        """
        if frame.colorspace not in CONVERTED:  # as FFmpeg 5: 10 as 9, BT.2020; else BT.601
            frame.colorspace = 9 if frame.colorspace == 10 else 2
        width, height = self.size
        image = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height, threads=1))
        left, right, top, bottom = self.margins
        image = image[top:len(image) - bottom, left:image.shape[1] - right]
        return upright(image, display_matrix(frame) or self.matrix)


def container_margins(container, index):
    """The pixels that mp4's clap box or Matroska's PixelCrop cut off a stream: [left, right, top, bottom]."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # else the description is empty
    description = container.dumps_format()  # PyAV has no other name for them
    av.logging.set_level(level)
    pattern = rf"Stream #0:{index}\b(?:(?!Stream #).)*Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)"
    margins = re.search(pattern, description, re.DOTALL)
    return [int(margin) for margin in margins.groups()] if margins else [0, 0, 0, 0]


def display_matrix(frame):
    """A decoded frame's display matrix, or None."""
    return SideDataContainer(frame).get("DISPLAYMATRIX")  # frame.side_data would make a reference cycle


def upright(image, matrix):
    """Rotates and flips an image [H, W, 3] as FFmpeg's display matrix says, if there is one.

    The matrix maps column x and row y of the stored picture to column a x + c y and row b x + d y of the shown one.
    """
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
    straight, crossed = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, crossed) > 0.02 * max(straight, crossed):
        raise ValueError("rotated, but not by a multiple of 90 degrees: rotate it upright")
    if straight < crossed:
        image, a, d = image.transpose(0, 1), c, b
    return image.flip([axis for axis, direction in ((0, d), (1, a)) if direction < 0])


def read_image(path):
    """Reads a JPEG or PNG file -> uint8 RGB [H, W, 3], by torchvision, which deprecates this, or by PyAV.

    PyAV interpolates a JPEG's colours less smoothly: in 12 videos 1 grey level apart on average, 22 at most.
    """
    data = np.fromfile(path, np.uint8)
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:
        decoder = av.CodecContext.create("mjpeg" if data[:2].tobytes() == b"\xff\xd8" else "png", "r")
        frame, = decoder.decode(av.Packet(data)) + decoder.decode(None)
        return upright(torch.from_numpy(frame.to_ndarray(format="rgb24")), display_matrix(frame))
    image = decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
    return v2.functional.to_dtype(image, torch.uint8, scale=True).permute(1, 2, 0)  # PNG may have 16 bits


HIDDEN = {"@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information",
          "lost+found", "__pycache__"}  # of file managers, NAS boxes and notebooks, as names with a dot first
PARTS = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|eval|dev)(?![a-z])", re.IGNORECASE)
PATH_AND_NUMBER = re.compile(r"(.*[^\s,])[\s,]+(-?\d{1,99})")


def frame_files(folder):
    """The paths of a folder's JPEG and PNG frames, in the order of the numbers in their names.

    If the names form groups by the words around their last number, as img_00001 and flow_x_00001, the group
    that begins with img, image, frame, rgb or color is taken. Raises BadVideo if there is no such group, or
    several, and for two files of one frame.
    """
    files, groups = [], {}  # [(words, numbers, name)], {words: first name}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name.lower())
        if suffix in IMAGE_SUFFIXES and name[0] != ".":
            words = re.sub(r"[\W_]+", " ", re.sub(r"\d+(\.\d+)?(\D*)$", r" \2", stem)).strip()
            words = words if re.search(r"[^\d ]", words) else ""  # a date's are numbers
            files.append((words, [Decimal(x) for x in re.findall(r"\d+(?:\.\d+)?", stem)], name))
            groups.setdefault(words, name)
    frames = [words for words in groups if len(groups) == 1 or re.match("img|image|frame|rgb|color", words)]
    if files and len(frames) != 1:
        raise BadVideo(f"{folder}: its pictures form {len(groups)} groups "
                       f"({', '.join(groups.values()):.99}): keep one of them")
    files = sorted(file for file in files if file[0] in frames)
    for file, following in zip(files, files[1:]):
        if file[1] == following[1]:
            raise BadVideo(f"{folder}: {file[2]} and {following[2]} are the same frame: keep one of them")
    return [os.path.join(folder, name) for _, _, name in files]


def read_list(path):
    """Reads a list file or a folder of videos -> [(path of a video or of a folder of frames, label or None)].

    A list has a video per line: `path label`, `path,label`, `path`, or VideoMAE's `path frames label`; labels
    are integers. If the whole line is a path that exists, the video has no label. Paths may hold spaces or be
    quoted as in CSV files; relative ones are relative to the list. In a folder, each class folder root/class/
    that holds videos, at any depth, is one label, in alphabetical order; videos in the root have no label.
    Raises CMAEVError, with the line's number, for a line without a video that exists, and for a folder of a
    data set's parts, as train and val.
    """
    path, left_out = os.fspath(path), []
    if not os.path.exists(path):
        raise CMAEVError(f"{path}: no such list or folder: give a text file with a `path label` per line, or a "
                         "folder of class folders; pretrain.py makes the demo's")
    if os.path.isdir(path):
        videos, labels = [], {}
        for video in _videos_in(path, left_out):
            folders = os.path.relpath(video, path).split(os.sep)[:-1]
            label = labels.setdefault(folders[0], len(labels)) if folders else None
            videos.append((video, label))
        parts = list(filter(PARTS.match, labels))
        if len(parts) > len(labels) / 2:
            raise CMAEVError(f"{path} holds a data set's parts ({', '.join(parts)}), not classes: give one as "
                             "--data, another as --val")
    else:
        videos = _read_list_file(path)
    if left_out:
        print0(f"{path}: {len(left_out)} files are not videos and are left out, for example {left_out[0]}")
    if not videos:
        raise CMAEVError(f"{path}: no videos in it: give a `path label` per line, or a folder of video files")
    return videos


def _videos_in(folder, left_out):
    """The videos in a folder, at any depth, in alphabetical order. Adds the other files to `left_out`."""
    videos, others = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == "." or entry.name in HIDDEN:
            continue
        if entry.is_dir():
            videos += _videos_in(entry.path, left_out)
        elif os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
            videos.append(entry.path)
        else:
            others.append(entry.path)
    if not videos and any(os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES for path in others):
        return [folder]  # a video as a folder of frames
    left_out += others
    return videos


def _readings(line):
    """Yields what a line of a list may mean: (path, label or None)."""
    yield line, None
    if match := PATH_AND_NUMBER.fullmatch(line):
        yield match[1], int(match[2])
        if counted := PATH_AND_NUMBER.fullmatch(match[1]):  # path frames label
            yield counted[1], int(match[2])
    if '"' in line:  # pandas and csv.writer quote a path that holds a space or comma
        yield from _readings(re.sub('"((?:[^"]|"")*)"?', lambda quoted: quoted[1].replace('""', '"'), line))


def _read_list_file(path):
    text = Path(path).read_text("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise CMAEVError(f"{path}: is not a text file: give a list in UTF-8 with one `path label` per line")
    root, videos = os.path.dirname(path), []
    in_root = functools.partial(os.path.join, root)

    @functools.cache  # asks the file system once per folder
    def names_in(folder):
        folder = in_root(folder) or "."
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def listed(reading):
        folder, slash, name = reading[0].rpartition("/")
        return name in names_in(folder + slash)

    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line:
            continue
        found = next(filter(listed, _readings(line)), None)
        if not found:
            readings = list(_readings(line))
            found = next((reading for reading in readings if os.path.exists(in_root(reading[0]))), None)
        if not found:
            raise CMAEVError(f"{path}, line {number}: {in_root(readings[-1][0])} does not exist (a line is a "
                             "path and a label, an integer; no header): correct it or take it out")
        name, label = found
        videos.append((in_root(name), label))
    return videos


def subset(videos, count, seed):
    """The first `count` videos of a seeded shuffle; all of them for 0."""
    if count == 0:
        return videos
    with seeded(seed) as generator:
        return [videos[i] for i in torch.randperm(len(videos), generator=generator)[:count]]


def check_readable(videos):
    """Raises BadVideo if none of the first ten videos can be opened: the list is probably of other files."""
    for path, _ in videos[:10]:
        with contextlib.suppress(BadVideo):
            return Video(path)
    Video(videos[0][0])  # raises its error


# 8  Weights ------------------------------------------------------------------------------------------------

HUGGING_FACE = {  # this project's names: Hugging Face's; "^" marks the start; replaced in this order
    "^patch_embed.proj.": "^embeddings.patch_embeddings.projection.",
    "^blocks.": "^encoder.layer.",
    "^norm.": "^layernorm.",
    "^head.": "^classifier.",
    "^decoder.embed.": "^encoder_to_decoder.",
    "^decoder.mask_token": "^mask_token",
    "^decoder.blocks.": "^decoder.decoder_layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".attn.": ".attention.attention.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
WRAPPERS = "model", "module", "state_dict", "model_state", "teacher"  # where training scripts put the weights
WEIGHTS = "a run's folder, its encoder.pt or checkpoint.pt, or VideoMAE's or Hugging Face's weights"


def convert_keys(state):
    """Renames VideoMAE's or Hugging Face's weights to this project's names, the decoder's to `decoder.*`."""
    new = {}
    for name, value in state.items():
        name = "^" + re.sub(r"^(module\.|_orig_mod\.|videomae\.|backbone\.)+", "", name)
        for ours, theirs in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        name = re.sub(r"\.attn\.([qkv])(uery|ey|alue)\.", r".attn.\1_", name)
        new[name.removeprefix("^").removeprefix("encoder.")] = value
    for q in [name for name in new if ".attn.q_" in name]:
        parts = [q.replace(".q_", f".{part}_") for part in "qkv"]
        if q.endswith("bias"):  # VideoMAE and most releases of transformers store no key bias
            new.setdefault(parts[1], torch.zeros_like(new[q]))
        new[q.replace(".q_", ".qkv.")] = torch.cat([new.pop(part) for part in parts if part in new])
    if "decoder.mask_token" in new:
        new["decoder.mask_token"] = new["decoder.mask_token"].flatten()
    return new


def split_biases(state):
    """Splits each attn.qkv.bias into VideoMAE's q_bias and v_bias."""
    split = dict(state)
    for name in state:
        if name.endswith(".attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            split[stem + "q_bias"], _, split[stem + "v_bias"] = split.pop(name).chunk(3)
    return split


def save_encoder(encoder, path):
    """Writes an encoder's file: {"model": state dict, with VideoMAE's names for a ViT, "geometry": ...}."""
    state = encoder.state_dict()
    if isinstance(encoder, VisionTransformer):
        state = split_biases(state)
    geometry = {"grid": list(encoder.grid), "cube": list(encoder.cube), "heads": encoder.heads}
    with atomic_write(path, "wb") as file:
        torch.save({"model": state, "geometry": geometry}, file)


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Writes a file under a temporary name, then renames it. Raises CMAEVError, as on a full disk."""
    partial = f"{path}.partial"
    text = dict(encoding="utf-8", errors="surrogateescape") if mode == "w" else {}  # names may be any bytes
    try:
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if isinstance(cause, OSError):
            raise CMAEVError(f"{path} cannot be written ({cause.strerror}): free space or give another") from None
        raise
    finally:
        Path(partial).unlink(missing_ok=True)


def parse_json(text, path, *keys):
    """Parses a file's JSON, or a line of it -> dict. Raises CMAEVError where one of the keys is missing."""
    with contextlib.suppress(ValueError, AttributeError):
        record = json.loads(text)
        if record.keys() >= set(keys):
            return record
    raise CMAEVError(f"{path} is damaged (it has {text[:40]!r}): restore it or delete it")


class Skipped:
    """Replaces a file's objects other than tensors and plain values: settings, paths, numpy's scalars."""
    def __init__(self, *args): ...
    def __setstate__(self, state): ...


def load_tensors(path):
    """Reads torch.save's file or `.safetensors` -> dict on the CPU. Runs no code of it. Raises CMAEVError."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.ZipFile(path).testzip():  # torch does not test it
            raise ValueError("wrong checksum")
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Skipped, name) for name in others]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise CMAEVError(f"{path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:
        reason = type(error).__name__
        raise CMAEVError(f"{path} cannot be read as weights ({reason}): restore it, or give another") from None


def read_weights(path):
    """Reads a weight file, a run's folder or a Hugging Face folder -> state dict with our names, about.

    about: dict of frames, size and heads, which shapes do not tell, where they are known: from a run's
    settings.json beside the file (then of all settings), from encoder.pt, or from Hugging Face's config.json.
    """
    path, state, about = Path(path), {}, {}
    files = [path] if path.is_file() else []
    for pattern in ("encoder.pt", "model*.safetensors", "pytorch_model*.bin", "checkpoint.pt"):
        files = files or sorted(path.glob(pattern))  # several: shards
    if not files:
        raise CMAEVError(f"{path}: no such file of weights: run pretrain.py first, or give {WEIGHTS}")
    for file in files:
        content = load_tensors(file)
        geometry = content.get("geometry")
        for name in WRAPPERS:
            if isinstance(content.get(name), dict):
                content = content[name]
        state |= {str(name): value for name, value in content.items() if torch.is_tensor(value)}

    settings, config = files[0].with_name("settings.json"), files[0].with_name("config.json")
    if settings.is_file():
        about = parse_json(settings.read_bytes(), settings, "settings")["settings"]
        _, sizes = ENCODERS.get(about.get("encoder"), (None, {}))
        about |= sizes
    elif geometry:
        frames, *size = [n * side for n, side in zip(geometry["grid"], geometry["cube"])]
        about = dict(frames=frames, size=size, heads=geometry["heads"])
    elif config.is_file():
        content = parse_json(config.read_bytes(), config)
        names = dict(num_frames="frames", image_size="size", num_attention_heads="heads")
        about = {names[name]: value for name, value in content.items() if name in names}
        if content.get("hidden_act", "gelu") != "gelu":
            raise CMAEVError(f"{config}: hidden_act is {content['hidden_act']}, only gelu is supported")
    return convert_keys(state), about


def encoder_of(state, about):
    """An encoder's class and arguments, from what read_weights gives. Raises KeyError or ValueError."""
    depths = Counter(name.split(".")[0] for name in state if name.endswith(".norm1.weight"))
    if "patch_embed1.proj.weight" in state:
        _, _, tubelet, side, _ = state["patch_embed1.proj.weight"].shape
        widths = tuple(len(state[f"embed_norms.{i}.weight"]) for i in range(3))
        kind, width, patch = ConvViT, widths[2], 4 * side
        sizes = dict(widths=widths, depths=tuple(depths[f"blocks{i}"] for i in (1, 2, 3)),
                     fusion=any(name.startswith("fusion") for name in state))
    else:
        width, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
        kind, sizes = VisionTransformer, dict(width=width, depth=depths["blocks"])
    defaults = dict(heads=max(1, min(16, width // 64)), frames=16, size=224)  # VideoMAE's; ViT-H has 16 heads
    sizes |= {name: about.get(name, value) for name, value in defaults.items()}
    return kind, dict(sizes, tubelet=tubelet, patch=patch)


def load_encoder(path, encoder=None, decoder=None):
    """Loads an encoder's weights, and a pixel decoder's if one is given and the file's fits -> the encoder.

    `path`: see WEIGHTS. Without an encoder, builds the file's. Positions are computed, not loaded. Raises
    CMAEVError for a missing weight, another shape, more blocks, other heads, NaN.
    """
    if decoder is not None and (Path(path) / "checkpoint.pt").is_file():
        path = Path(path) / "checkpoint.pt"  # a run's encoder.pt has no decoder
    state, about = read_weights(path)
    try:
        kind, arguments = encoder_of(state, about)
        encoder = encoder or kind(**arguments)
    except (KeyError, ValueError) as error:
        raise CMAEVError(f"{path} holds no encoder ({last_line(error)}): give {WEIGHTS}") from None
    theirs = f"{kind.__name__}, " + ", ".join(f"{name} {value}" for name, value in arguments.items())
    print0(f"{path} holds a {theirs}")
    if about.get("heads") not in (None, encoder.heads):
        raise CMAEVError(f"{path} is of another model, with other attention heads: it holds a {theirs}")
    if "fc_norm.weight" in state:  # a fine-tuned file, without the final norm
        state = encoder.norm.state_dict(prefix="norm.") | state
    own, parts = encoder.state_dict(), ("blocks", "patch_embed", "pos_embed", "cls_token")
    of_encoder = {name: value for name, value in state.items() if name in own or name.startswith(parts)}
    load_weights(encoder, of_encoder, path, f": it holds a {theirs}")
    if decoder is not None:
        of_decoder = {name: value for name, value in state.items() if name.startswith("decoder.")}
        try:
            load_weights(nn.ModuleDict({"decoder": decoder}), of_decoder, path)
        except CMAEVError as error:
            print0(f"note: the decoder starts anew: {error}")
    return encoder


def load_weights(module, state, path, advice=""):
    """load_state_dict, strict. Raises CMAEVError for missing and unknown weights, other shapes, NaN and inf."""
    own, wrong = module.state_dict(), f"{path} is of another model"
    for name in own | state:
        there, here = (list(x[name].shape) if name in x else "missing" for x in (state, own))
        if there != here:
            raise CMAEVError(f"{wrong}: {name} is {there} in the file, {here} here{advice}")
        if not state[name].isfinite().all():
            raise CMAEVError(f"{path}: {name} holds NaN or inf, as of a run that diverged: give another")
    module.load_state_dict(state)


# 9  Training: what both scripts share ----------------------------------------------------------------------

def objects_of_ranks(value):
    """Gathers a Python object of each rank -> list."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def number(kind, interval):
    """Makes an argparse type: a number of `kind` in an interval such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        if low < value < high or (value == low and "[" in interval) or (value == high and "]" in interval):
            return value
        raise argparse.ArgumentTypeError(f"{text}: give a number in {interval}")
    parse.__name__ = kind.__name__  # argparse names it where the text is not a number
    return parse


COUNT, WHOLE, POSITIVE = number(int, "[1, inf)"), number(int, "[0, inf)"), number(float, "(0, inf)")
NOT_NEGATIVE, SHARE, BELOW_ONE = number(float, "[0, inf)"), number(float, "[0, 1]"), number(float, "[0, 1)")


def argument_parser(text):
    """Makes an argparse parser with the first line of a script's docstring."""
    return argparse.ArgumentParser(description=text.splitlines()[0], allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def parse_settings(parser, recipes, argv):
    """Parses the command line -> settings, a Namespace.

    The values of --recipe, a dict in `recipes`, replace the parser's defaults. --data without --val drops its --val.
    settings.overridden: {name of a given flag: its default}.
    Raises CMAEVError for a wrong flag or value, and for --data without --recipe.
    """
    def fail(message):
        raise CMAEVError(f"{message} (--help lists the settings)")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # finds the recipe, for --help too
    for each in (first, parser):
        each.error = fail
        each.add_argument("--recipe", choices=recipes, default="demo", help="fills all settings")
    parser.set_defaults(**recipes[first.parse_known_args(argv)[0].recipe])
    settings = parser.parse_args(argv)
    words = [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    given = {word.removeprefix("no-").replace("-", "_") for word in words}
    settings.overridden = {name: parser.get_default(name) for name in sorted(given)}
    if "data" in given and not given & {"recipe", "eval", "predict", "features"}:
        fail("--data without --recipe: give --recipe small (16 frames of 112x112 pixels), k400 or ssv2 "
             "(of 224x224, sampled as for Kinetics-400 or Something-Something V2), demo (8 of 56x56), or, to "
             "finetune.py, a run's folder as --init")
    if "val" in given and not given & {"data", "eval", "predict", "features"}:
        fail("--val without --data: give both")
    if "data" in given and "val" not in given:
        settings.val = ""
    if settings.warmup_epochs >= settings.epochs:
        fail(f"{flag(settings, 'warmup_epochs')}: give less than {flag(settings, 'epochs')}")
    return settings


def flag(s, name):
    """How an error names a flag: "--lr 0.1", or "the recipe's --lr 0.1" if the user did not give it."""
    text = f"--{name.replace('_', '-')} {getattr(s, name)}"
    return text if name in s.overridden else f"the recipe's {text}"


def run_script(main):
    """Runs a script's main(). An error that the user can fix ends it in one line, Ctrl-C in none."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    try:
        elastic_errors.record(main)()  # for torchrun's summary
    except (CMAEVError, OSError) as error:  # OSError: a full disk, a folder that cannot be written to
        rank = f" on rank {this_rank()}" if this_rank() else ""
        sys.exit(f"error{rank}: {last_line(error)}")
    except RuntimeError as error:
        if not re.search("(out of|insufficient) shared memory|</torch_", str(error)):
            raise
        sys.exit("error: the shared memory, /dev/shm, is too small for the workers' batches: enlarge it "
                 "(docker run --shm-size=8g or --ipc=host), or give --workers 0")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        workers = multiprocessing.active_children()
        if workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each killed worker
        for worker in workers:
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def join_ranks():
    """Joins the process group that RANK and WORLD_SIZE name, if they do -> this rank's device."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on a CPU: pages of 2 MiB instead of 4 KiB
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_RANK") or 0) if gpus > 1 else 0  # SLURM may show a task one GPU
        if int(os.environ.get("LOCAL_WORLD_SIZE") or local + 1) > gpus:
            raise CMAEVError(f"there are more ranks on this node than its {gpus} GPUs: start one per GPU")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if (os.environ.get("RANK") or "0") != "0" or (os.environ.get("WORLD_SIZE") or "1") != "1":
        dist.init_process_group(backend)  # its errors name the environment variable that is missing
    return device


def hash_of(lists):
    """A short hash of lists, for comparison."""
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]


def check_ranks(settings, device, *lists):
    """Raises CMAEVError on each rank if they differ in settings (except --workers), precision or lists."""
    here = vars(settings) | dict(amp=amp_dtype(settings.amp, device), workers=0, lists=hash_of(lists))
    ranks = objects_of_ranks(here)
    differ = [name for name in here if any(there[name] != here[name] for there in ranks)]
    if differ:
        raise CMAEVError(f"the ranks differ in {', '.join(sorted(differ))}: give all the same command and lists")


SAVED_AND_STOPPED = 75  # exit code after SIGTERM: EX_TEMPFAIL of sysexits.h, "try again"


def notice_signals():
    """Keeps SIGTERM (SLURM, torchrun, kill) and a first Ctrl-C from ending the process.

    Returns a function that all ranks call together -> the signal that any rank has received, or 0.
    """
    received = [0]

    def note(signum, _):
        received.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)  # a second Ctrl-C ends the process at once
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, note)
    return lambda: max(objects_of_ranks(max(received)))


def stop_run(signum, step):
    """Ends the process after a signal, when rank 0 has saved."""
    objects_of_ranks(None)  # waits for rank 0
    print0(f"stopped by {signal.Signals(signum).name}, saved after step {step}: the same command continues")
    sys.exit(130 if signum == signal.SIGINT else SAVED_AND_STOPPED)


def ignore_signals(worker):
    """Makes a worker ignore Ctrl-C and SIGTERM, which a terminal or SLURM sends to all processes.

    Linux ends the worker with the trainer; elsewhere torch's watchdog does so, seconds later.
    """
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # no public name
    if not multiprocessing.parent_process().is_alive():  # it ended before this call
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(clips, workers, device, **order):
    """The DataLoader that all loops use. workers None: on a GPU one per core, at most 16 per rank; else 2."""
    if workers is None and device.type == "cuda":
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        workers = min(16, max(1, cores))
    elif workers is None:
        workers = 2  # the CPU trains
    return DataLoader(clips, num_workers=workers, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_signals, **order)


def rank_indices(clips):
    """Sampler for one pass: each clip once over all ranks, without padding."""
    return [(0, i) for i in range(this_rank(), len(clips), world_size())]


def batches(num_videos, batch, steps, seed, start=0, num_micro_batches=1):
    """Yields this rank's micro-batches, `num_micro_batches` per step, from step `start` on: lists of (epoch, index).

    Each epoch is a permutation of the videos, seeded by (seed, epoch), cut into global batches and then into
    ranks. It drops the videos left over at its end. One iterator serves all epochs: workers never restart.
    """
    per_epoch, per_rank = num_videos // batch, batch // world_size()
    size = per_rank // num_micro_batches
    for step in range(start, steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            with seeded(seed, epoch) as generator:
                order = torch.randperm(num_videos, generator=generator).tolist()
        first = i * batch + this_rank() * per_rank
        for k in range(first, first + per_rank, size):
            yield [(epoch, index) for index in order[k:k + size]]


def count_micro_batches(s, repeats=1):
    """Number of micro-batches per step and rank. Raises CMAEVError if --batch-size does not divide into them.

    `repeats`: how many clips of each video stay together.
    """
    per_rank = s.batch_size // world_size()
    size = min(s.micro_batch, per_rank) or per_rank
    if s.batch_size % world_size() or per_rank % size or size % repeats:
        raise CMAEVError(f"{flag(s, 'batch_size')}: give a multiple of {world_size()} ranks x "
                         f"{flag(s, 'micro_batch')} (0: all), which must be a multiple of {repeats} repeats")
    return per_rank // size


class Feed:
    """A loader's batches on the device, [videos, repeats, ...] -> [repeats x videos, ...]; masks on the CPU.

    The clips of one video are not neighbours, because mixup and cutmix mix neighbours. On CUDA the copies run
    from pinned memory on their own stream, during the previous step.
    """

    def __init__(self, source, device):
        self.source, self.device, self.waits = iter(source), device, []
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None

    def __next__(self):
        began = self.mark()
        batch = next(self.source)
        if self.copies:
            with torch.cuda.stream(self.copies):
                batch = {name: x if name == "mask" else x.to(self.device, non_blocking=True)
                         for name, x in batch.items()}
            stream = torch.cuda.current_stream()
            stream.wait_stream(self.copies)
            for name in batch.keys() - {"mask"}:
                batch[name].record_stream(stream)  # its memory is not reused before the step has read it
        batch = {name: x.transpose(0, 1).flatten(0, 1) for name, x in batch.items()}
        self.waits.append((began, self.mark()))
        return batch

    def mark(self):
        """A time stamp: a CUDA event, or seconds on a CPU."""
        if self.copies is None:
            return time.perf_counter()
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    def waited(self):
        """Seconds that the device waited for data since the last call. Call it after a synchronisation."""
        waits, self.waits = self.waits, []
        if self.copies is None:
            return sum(end - began for began, end in waits)
        return sum(began.elapsed_time(end) for began, end in waits) / 1000


def amp_dtype(name, device):
    """--amp auto, bf16, fp16 or none -> torch.bfloat16, torch.float16 or None (float32)."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if torch.cpu._is_avx512_bf16_supported() else "none"  # no public name in torch yet
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]


def grad_scaler(dtype, device):
    """Scales the loss for fp16. For bf16 and float32 the scale stays 1: the scaler only skips bad steps."""
    scale, interval = (2.0**16, 2000) if dtype is torch.float16 else (1.0, 0)  # 0: a mark for resume
    return torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=interval)


def data_parallel(model):
    """Wraps a model in DDP if there are several ranks: it averages their gradients."""
    if world_size() == 1:
        return model
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel.broadcast_buffers = False  # the constant tables; torch 2.14 deprecates the argument
    return parallel


def optimizer_step(parameters, optimizer, scaler, dtype, max_norm=0.0):
    """Optimiser step after scaler.scale(loss).backward() -> gradient norm, a float32 scalar.

    `max_norm` 0: no clipping. A norm that is not finite skips the step, on all ranks, as DDP has averaged the
    gradients. No synchronisation.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    grad_norm = grad_norm / scaler.scale(torch.ones_like(grad_norm))
    factor = ((max_norm or math.inf) / (grad_norm + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, factor.where(grad_norm.isfinite(), math.nan))  # for NaN the scaler skips
    scaler.step(optimizer)
    scaler.update(None if dtype is torch.float16 else 1.0)
    optimizer.zero_grad()
    return grad_norm


def learning_rate(step, warmup, steps, start, peak, floor):
    """Linear from `start` to `peak` over the warm-up steps, then a half cosine to `floor` [VideoMAE]."""
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def set_learning_rate(optimizer, s, step, per_epoch):
    """Sets each group's rate to lr * group["scale"] -> lr. The settings' rates are per --batch-size 256."""
    per_256 = s.batch_size / 256
    lr = learning_rate(step, s.warmup_epochs * per_epoch, s.epochs * per_epoch,
                       per_256 * s.warmup_lr, per_256 * s.lr, per_256 * s.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    return lr


def note_weak_settings(s, steps):
    """Prints a note if a run has few steps, or a peak learning rate below a tenth of the recipe's."""
    if steps < 500:
        print0(f"note: {steps} steps are few: for 500 give --epochs {math.ceil(500 * s.epochs / steps)}")
    recipe = vars(s) | s.overridden
    ratio = s.lr * s.batch_size / (recipe["lr"] * recipe["batch_size"])
    if ratio < 0.1:
        print0(f"note: the learning rate, --lr x --batch-size / 256, is {ratio:.1%} of the recipe's: for that "
               f"give --lr {s.lr / ratio:.1e}")


def decay_groups(model, weight_decay):
    """AdamW's groups: weight decay on matrices, none on biases, norms and the mask token, which are 1-D."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in trained if p.ndim > 1], weight_decay=weight_decay),
            dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0)]


class Meter:
    """Sums values over the steps since the last log line, on the device: no synchronisation before `read`."""

    def __init__(self, names, device):
        self.names = names
        self.step, self.began = 0, time.perf_counter()  # of the last log line
        self.counts = dict(bad_clips=0, skipped_steps=0)  # of the whole run
        self.sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=device)
        self.in_a_row = torch.zeros((), device=device)  # skipped steps in a row, ending with the last

    def add(self, values, grad_norm, replaced):
        """Adds a step's values, a float scalar per name, unless it was skipped; counts its replaced clips."""
        skipped = ~grad_norm.isfinite()
        self.sums += torch.cat([torch.stack(values).where(~skipped, 0), torch.stack([skipped, replaced])])
        self.in_a_row = (self.in_a_row + 1) * skipped

    def read(self, step, clips, per_epoch, bad_share):
        """Returns a log line's record: means over steps and ranks, counts, speed. Synchronises.

        `clips`: per step; `per_epoch`: steps. Raises CMAEVError if the last 20 steps were all skipped, or if
        bad videos exceed `bad_share` of the clips so far, or of one epoch's clips if these are more.
        """
        *sums, skipped, replaced = sum_over_ranks(self.sums).tolist()
        self.sums.zero_()
        self.counts["bad_clips"] += round(replaced)
        self.counts["skipped_steps"] += round(skipped / world_size())
        if self.in_a_row >= 20:  # fp16 skips up to about 16 at the start, while it looks for its scale
            raise CMAEVError(f"step {step}: {int(self.in_a_row)} steps in a row had a loss or a gradient that "
                             "is not finite and were skipped: give a lower --lr, or --amp none")
        if self.counts["bad_clips"] > bad_share * clips * max(step, per_epoch):
            raise CMAEVError(f"{self.counts['bad_clips']} of {step * clips} clips were of bad videos, which "
                             "bad-videos.jsonl names: take them off the list, or give a larger --bad-share")
        seconds, steps = time.perf_counter() - self.began, step - self.step
        self.step, self.began = step, time.perf_counter()
        taken = steps * world_size() - skipped
        means = {name: x / taken if taken else math.nan for name, x in zip(self.names, sums)}
        return dict(step=step, epoch=step / per_epoch) | means | self.counts | dict(
            seconds=seconds, step_ms=1000 * seconds / steps, clips_per_s=steps * clips / seconds,
            memory_mib=torch.cuda.max_memory_allocated() / 2**20)  # 0 on a CPU

    def state_dict(self):
        return self.counts

    def load_state_dict(self, counts):
        self.counts = dict(counts)


def open_run(folder, settings, free, videos, **about):
    """Creates a run's folder, or checks that it holds this run. Locks it until the process ends.

    settings.json stores the settings, the videos' number and hash, versions and `about`. Raises CMAEVError
    if the videos or settings, except those in `free`, differ from those of the folder's checkpoint.
    """
    path, values, listed = Path(folder) / "settings.json", vars(settings), [len(videos), hash_of(videos)]
    if path.exists() and (Path(folder) / "checkpoint.pt").exists():
        old = parse_json(path.read_bytes(), path, "settings", "videos")
        changed = [f"{name} {value} -> {values[name]}" for name, value in sorted(old["settings"].items())
                   if name in values.keys() - free and values[name] != value]
        if changed:
            raise CMAEVError(f"{folder} holds a run with other settings ({'; '.join(changed)}): give the old "
                             "ones to continue it, or another --out; another number of epochs needs a new run")
        if old["videos"] != listed:
            raise CMAEVError(f"{settings.data} has changed since {folder} began ({old['videos'][0]} videos "
                             f"then, {listed[0]} now): restore it, or give another --out")
    Path(folder).mkdir(parents=True, exist_ok=True)  # on each rank, for bad-videos.jsonl
    if this_rank() == 0:
        lock_run(folder)
        versions = {name: sys.modules[name].__version__ for name in ("torch", "torchvision", "av", "numpy")}
        stored = dict(settings=values, videos=listed, world_size=world_size(), **versions, **about)
        with atomic_write(path) as file:
            json.dump(stored, file, indent=1)


def lock_run(folder):
    """Locks a run's folder until this process ends, however it ends. Raises CMAEVError if another one has."""
    never_closed = os.open(f"{folder}/lock", os.O_WRONLY | os.O_CREAT, 0o666)  # closing it releases the lock
    try:
        import fcntl
        fcntl.lockf(never_closed, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it, unlike flock's
    except BlockingIOError:
        raise CMAEVError(f"{folder} is in use by another process: wait, or give another folder") from None
    except (ImportError, OSError):  # Windows; a file system without locks
        pass


def save_checkpoint(run, step, state, name="checkpoint.pt"):
    """Writes run/`name` on rank 0. `state`: {name: object with a state dict}."""
    if this_rank() == 0:
        with atomic_write(f"{run}/{name}", "wb") as file:
            torch.save(dict(step=step, **{name: holder.state_dict() for name, holder in state.items()}), file)


def resume(run, state):
    """Loads run/checkpoint.pt into `state`, removes later log lines -> the step to continue from, or 0.

    Raises CMAEVError if the ranks see checkpoints of different steps: DDP would average them.
    """
    path, log, step = Path(run) / "checkpoint.pt", Path(run) / "log.jsonl", 0
    if path.exists():
        checkpoint = load_tensors(path)
        load_weights(state["model"], checkpoint["model"], path)
        for name, holder in state.items():
            if name != "scaler" or holder.get_growth_interval() == checkpoint[name]["growth_interval"]:
                holder.load_state_dict(checkpoint[name])  # another --amp starts with its own scale
        step = state["meter"].step = checkpoint["step"]
    if len(set(objects_of_ranks(step))) > 1:
        raise CMAEVError(f"the ranks differ in checkpoint.pt of {run}: give --out on a disk that they share")
    if this_rank() == 0:
        log.touch()
        kept = sum(record["step"] <= step for record in read_log(run))
        lines = log.read_bytes().splitlines(keepends=True)
        with atomic_write(log, "wb") as file:
            file.writelines(lines[:kept])
    return step


def write_log(run, record, steps, text):
    """Appends a record to run/log.jsonl and prints it, on rank 0. `text`: the losses in the printed line."""
    if this_rank() == 0:
        with open(f"{run}/log.jsonl", "a") as file:
            numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
            print(json.dumps(numbers), file=file)  # JSON has no NaN
        left = timedelta(seconds=round(record["step_ms"] * (steps - record["step"]) / 1000))
        line = ("step {step}/{steps}  epoch {epoch:.2f}  {text}  lr {lr:.1e}  grad {grad_norm:.2f}  "
                "{clips_per_s:.1f} clips/s  data wait {data_wait:.0%}  GPU {memory_mib:.0f} MiB  {left} left")
        print(line.format(steps=steps, text=text, left=left, **record), flush=True)


def read_log(run):
    """A run's log -> list of dicts, one per line. null, a number that was not finite, becomes NaN."""
    log, records = Path(run) / "log.jsonl", []
    for line in log.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # else it is torn, or being written
            record = parse_json(line, log, "step")
            records.append({name: math.nan if value is None else value for name, value in record.items()})
    return records


if __name__ == "__main__":
    print("this is a module: run pretrain.py, finetune.py, or a tool: python -m tools.one_clip clip.mp4")
