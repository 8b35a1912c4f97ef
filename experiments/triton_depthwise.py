"""The depthwise 5 x 5 x 5 convolution in Triton, with its gradients, on zero-padded maps [B, T, H, W, C]."""

import torch
import triton
import triton.language as tl


@triton.jit
def convolve_kernel(x, weight, out, T, H, W, C, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """One time step of one clip, POSITIONS neighbouring positions, CHANNELS channels; sums in float32."""
    plane, t = tl.program_id(0).to(tl.int64), tl.program_id(0) % T  # plane: clip * T + time step
    p = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    rows, columns = p // W, p % W
    at = (plane * H * W + p)[:, None] * C + c
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for i in range(tl.maximum(2 - t, 0), tl.minimum(T + 2 - t, 5)):  # the taps inside the clip
        for j in range(5):
            inside = (rows + j >= 2) & (rows + j < H + 2)
            for k in tl.static_range(5):
                mask = (inside & (columns + k >= 2) & (columns + k < W + 2))[:, None] & (c < C)
                shift = ((i - 2) * H + j - 2) * W + k - 2
                value = tl.load(x + (at + shift * C), mask=mask, other=0).to(tl.float32)
                tap = tl.load(weight + ((i * 5 + j) * 5 + k) * C + c, mask=c < C, other=0).to(tl.float32)
                total += value * tap
    tl.store(out + at, total, mask=(p < H * W)[:, None] & (c < C))


@triton.jit
def weight_kernel(x, grad, out, T, H, W, C, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """One time step's share in the gradient of five taps, one row: out [B * T, 125, C], float32."""
    plane, t = tl.program_id(0).to(tl.int64), tl.program_id(0) % T
    i, j = tl.program_id(1) // 5, tl.program_id(1) % 5
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, 8)[:, None]  # a power of 2; 5 are used
    shift = ((i - 2) * H + j - 2) * W + k - 2
    total = tl.zeros((8, POSITIONS, CHANNELS), tl.float32)
    for first in range(0, tl.where((t + i >= 2) & (t + i < T + 2), H * W, 0), POSITIONS):
        p = first + tl.arange(0, POSITIONS)
        rows, columns = p // W + j, (p % W)[None] + k  # of x, plus 2: [POSITIONS], [8, POSITIONS]
        at = (plane * H * W + p)[:, None] * C + c
        g = tl.load(grad + at, mask=(p < H * W)[:, None] & (c < C), other=0).to(tl.float32)
        mask = (k < 5) & (rows >= 2) & (rows < H + 2) & (columns >= 2) & (columns < W + 2)
        value = tl.load(x + (at[None] + (shift * C)[:, :, None]), mask=mask[:, :, None] & (c < C), other=0)
        total += value.to(tl.float32) * g[None]
    at = (plane * 125 + (i * 5 + j) * 5 + k) * C + c
    tl.store(out + at, tl.sum(total, 1), mask=(k < 5) & (c < C))


class Convolution(torch.autograd.Function):
    """x [B, T, H, W, C], weight [5, 5, 5, C] -> [B, T, H, W, C], without a bias."""

    @staticmethod
    def convolve(x, weight):
        out, (batch, frames, height, width, channels) = torch.empty_like(x), x.shape
        grid = batch * frames, triton.cdiv(height * width, 64), triton.cdiv(channels, 32)
        convolve_kernel[grid](x, weight, out, frames, height, width, channels, 64, 32)
        return out

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return Convolution.convolve(x, weight)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), grad = ctx.saved_tensors, grad.contiguous()
        planes, channels = x.shape[0] * x.shape[1], x.shape[4]
        parts = grad.new_empty(planes, 125, channels, dtype=torch.float32)
        weight_kernel[planes, 25, triton.cdiv(channels, 32)](x, grad, parts, *x.shape[1:], 16, 32)
        grad_x = Convolution.convolve(grad, weight.flip(0, 1, 2).contiguous())
        return grad_x, parts.sum(0).view_as(weight).to(weight.dtype)
