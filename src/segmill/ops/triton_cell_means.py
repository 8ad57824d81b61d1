"""Adaptive average pooling of channels-last maps on CUDA; the plain counterpart says what.

Forward: a program sums one cell for some channels. Backward: a program takes some pixels and
channels and reads the cells that a pixel is in, at most two by two; nothing is added atomically, so
results are the same each time (torch's own are not).
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from segmill.ops.token_maps import readable

TILE = 2048  # values of one step of a program
WARPS = {"num_warps": 4}


class CellMeansCuda(torch.autograd.Function):
    """`tokens` (B, h, w, D) to (B, grid * grid, D), of the same type; grid is at most h and w."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, grid: int) -> Tensor:
        """Sums in float32."""
        tokens = readable(tokens)
        B, h, w, D = tokens.shape
        means = tokens.new_empty((B, grid * grid, D))
        channels = _channels(D)
        programs = (B * grid * grid, triton.cdiv(D, channels))
        _average[programs](
            tokens, means, h, w, D, tokens.stride(2),
            GRID=grid, PIXELS=TILE // channels, CHANNELS=channels, **WARPS,
        )  # fmt: skip
        ctx.size, ctx.grid = (B, h, w, D), grid
        return means

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None]:
        """To every pixel the shares of the cells that it is in."""
        B, h, w, D = ctx.size
        gradient = gradients[0].contiguous()
        result = gradient.new_empty(ctx.size)
        channels = _channels(D)
        pixels = TILE // channels
        programs = (triton.cdiv(B * h * w, pixels), triton.cdiv(D, channels))
        _spread[programs](
            gradient, result, B * h * w, h, w, D,
            GRID=ctx.grid, PIXELS=pixels, CHANNELS=channels, **WARPS,
        )  # fmt: skip
        return result, None


def _channels(width: int) -> int:
    return min(64, max(8, triton.next_power_of_2(width)))


@triton.jit
@no_type_check
def _average(
    tokens, means, h, w, D, stride, GRID: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    cell = tl.program_id(0)
    image = (cell // (GRID * GRID)).to(tl.int64)
    row, column = (cell // GRID) % GRID, cell % GRID
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < D
    top, bottom = row * h // GRID, ((row + 1) * h + GRID - 1) // GRID
    left, right = column * w // GRID, ((column + 1) * w + GRID - 1) // GRID
    wide = right - left
    count = (bottom - top) * wide
    tokens += image * h * w * stride
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for first in range(0, count, PIXELS):
        local = first + tl.arange(0, PIXELS)
        place = ((top + local // wide) * w + left + local % wide) * stride
        mask = (local < count)[:, None] & real[None, :]
        value = tl.load(tokens + place[:, None] + c[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32)
    mean = tl.sum(total, axis=0) / count
    place = cell.to(tl.int64) * D + c
    tl.store(means + place, mean.to(means.dtype.element_ty), mask=real)


@triton.jit
@no_type_check
def _spread(
    gradient, result, pixels, h, w, D,
    GRID: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * PIXELS
    local = tl.arange(0, PIXELS)
    pixel = tl.program_id(0) * PIXELS + local
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known, real = pixel < pixels, c < D
    x, y, image = pixel % w, (pixel // w) % h, pixel // (h * w)
    # First and last cell along each axis: the same one, or two neighbours that overlap here.
    up, low = y * GRID // h, ((y + 1) * GRID - 1) // h
    left, right = x * GRID // w, ((x + 1) * GRID - 1) // w
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for step in tl.static_range(4):
        row, column = up + step // 2, left + step % 2
        inside = known & (row <= low) & (column <= right)
        high = ((row + 1) * h + GRID - 1) // GRID - row * h // GRID
        wide = ((column + 1) * w + GRID - 1) // GRID - column * w // GRID
        place = ((image * GRID + row) * GRID + column) * D
        mask = inside[:, None] & real[None, :]
        value = tl.load(gradient + place[:, None] + c[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32) / (high * wide).to(tl.float32)[:, None]
    mask = known[:, None] & real[None, :]
    place = (local * D)[:, None] + c[None, :]
    tl.store(result + first * D + place, total.to(result.dtype.element_ty), mask=mask)
