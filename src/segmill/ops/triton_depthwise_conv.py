"""Depthwise convolution of channels-last maps on CUDA; the plain counterpart says what.

The result and the gradient of the input: a program takes some pixels and channels; neighbouring
taps are read from the cache. Gradient of the weights: a program goes down a chunk of pixels for
some channels and taps, and the chunks are summed in a fixed order, so that results are the same
each time. With GELU the value before it is computed again in the backward pass, never stored.
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from segmill.ops.token_maps import readable

TILE = 2048  # values of one program of the convolution: 16 for each thread of four warps
SMALL_TILE = 1024  # of one step of the weights' gradient: 8 for each thread and tap
PROGRAMS = 1056  # that the weights' gradient is spread over: 8 for each multiprocessor of an H200
WARPS = {"num_warps": 4}
PLAIN, GELU, GELU_GRADIENT = 0, 1, 2  # what a convolution ends with


class DepthwiseConvCuda(torch.autograd.Function):
    """`tokens` (B, h, w, D), `weight` (D, 1, k, k); `itself`: tokens are added, else `other` is."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        other: Tensor | None,
        itself: bool,
        gelu: bool,
        kind: torch.dtype,
    ) -> Tensor:
        """The result is of type `kind`, contiguous."""
        tokens = readable(tokens)
        other = None if other is None else readable(other)
        # Taps first, so that channels lie side by side, in the type that torch would convolve in.
        table = weight.detach().flatten(1).t().to(tokens.dtype).contiguous()
        result = _convolved(
            tokens, table, bias, tokens if itself else other, kind, GELU if gelu else PLAIN
        )
        ctx.save_for_backward(tokens, table, bias, other if gelu else None)
        ctx.itself, ctx.gelu, ctx.kinds = itself, gelu, (weight.dtype, bias.dtype)
        ctx.other_kind = None if other is None else other.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """To tokens, weights, bias and what was added."""
        tokens, table, bias, other = ctx.saved_tensors
        gradient = readable(gradients[0])
        if ctx.gelu:
            added = tokens if ctx.itself else other
            gradient = _convolved(
                tokens, table, bias, added, gradient.dtype, GELU_GRADIENT, gradient
            )
        to_tokens = to_weight = to_bias = to_other = None
        if ctx.needs_input_grad[0]:
            back = gradient if ctx.itself else None
            to_tokens = _convolved(gradient, table, None, back, tokens.dtype, PLAIN, flip=True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            sums = _correlated(tokens, gradient, len(table))
            k = round(len(table) ** 0.5)
            to_weight = sums[:-1].t().reshape(-1, 1, k, k).to(ctx.kinds[0])
            to_bias = sums[-1].to(ctx.kinds[1])
        if ctx.needs_input_grad[3]:
            to_other = gradient.to(ctx.other_kind)
        return to_tokens, to_weight, to_bias, to_other, None, None, None


def _convolved(
    tokens: Tensor,
    table: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    kind: torch.dtype,
    ending: int,
    upstream: Tensor | None = None,
    *,
    flip: bool = False,
) -> Tensor:
    B, h, w, D = tokens.shape
    result = torch.empty((B, h, w, D), dtype=kind, device=tokens.device)
    channels = _channels(D)
    pixels = TILE // channels
    grid = (triton.cdiv(B * h * w, pixels), triton.cdiv(D, channels))
    added_or, upstream_or = (tokens if each is None else each for each in (added, upstream))
    _convolve[grid](
        tokens, table, table if bias is None else bias, added_or, upstream_or, result,
        B * h * w, h, w, D, tokens.stride(2), added_or.stride(2), upstream_or.stride(2),
        K=round(len(table) ** 0.5), FLIP=flip, BIAS=bias is not None, ADDED=added is not None,
        ENDING=ending, PIXELS=pixels, CHANNELS=channels, **WARPS,
    )  # fmt: skip
    return result


def _correlated(tokens: Tensor, gradient: Tensor, taps: int) -> Tensor:
    """(taps + 1, D): the gradients of all taps, and of the bias."""
    B, h, w, D = tokens.shape
    channels = _channels(D)
    pixels = SMALL_TILE // channels
    blocks = triton.cdiv(D, channels)
    # Kernels of 3 x 3 in one program, of the others a row of taps.
    together = 9 if taps == 9 else round(taps**0.5)
    groups = taps // together
    steps = triton.cdiv(triton.cdiv(B * h * w, pixels), max(1, PROGRAMS // (blocks * groups)))
    chunks = triton.cdiv(B * h * w, pixels * steps)
    sums = torch.empty((chunks, taps + 1, D), dtype=torch.float32, device=tokens.device)
    _correlate[(groups, blocks, chunks)](
        tokens, gradient, sums, B * h * w, h, w, D, steps, tokens.stride(2), gradient.stride(2),
        K=round(taps**0.5), TAPS=together, PIXELS=pixels, CHANNELS=channels, **WARPS,
    )  # fmt: skip
    return sums.sum(0)


def _channels(width: int) -> int:
    """Of one program: as many as divide the width, whose last program else idles in part."""
    fitting = [channels for channels in (64, 32, 16) if width % channels == 0]
    return fitting[0] if fitting else min(64, max(8, triton.next_power_of_2(width)))


@triton.jit
@no_type_check
def _convolve(
    tokens, table, bias, added, upstream, result,
    pixels, h, w, D, t_stride, a_stride, u_stride,
    K: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
    ENDING: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * PIXELS + local
    # 64 bits for the first pixel only; offsets from it fit 32.
    first = tl.program_id(0).to(tl.int64) * PIXELS
    known = pixel < pixels
    x, y = pixel % w, (pixel // w) % h
    real = c < D
    tokens += first * t_stride
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for ky in range(K):
        down = ky - K // 2
        in_rows = known & (y + down >= 0) & (y + down < h)
        for kx in tl.static_range(K):
            right = kx - K // 2
            inside = in_rows & (x + right >= 0) & (x + right < w)
            place = (local + down * w + right) * t_stride
            value = tl.load(
                tokens + place[:, None] + c[None, :],
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            tap = ky * K + kx
            if FLIP:
                tap = K * K - 1 - tap
            factor = tl.load(table + tap * D + c, mask=real, other=0.0)
            total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    mask = known[:, None] & real[None, :]
    if BIAS:
        total += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        place = (local * a_stride)[:, None] + c[None, :]
        total += tl.load(added + first * a_stride + place, mask=mask, other=0.0).to(tl.float32)
    if ENDING > 0:
        below = 0.5 + 0.5 * tl.erf(total * 0.7071067811865476)
        if ENDING == 1:
            total = total * below
        else:
            place = (local * u_stride)[:, None] + c[None, :]
            factor = tl.load(upstream + first * u_stride + place, mask=mask, other=0.0)
            slope = below + total * 0.3989422804014327 * tl.exp(-0.5 * total * total)
            total = factor.to(tl.float32) * slope
    place = (local * D)[:, None] + c[None, :]
    tl.store(result + first * D + place, total.to(result.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _correlate(
    tokens, gradient, sums, pixels, h, w, D, steps, t_stride, g_stride,
    K: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    chunk = tl.program_id(2).to(tl.int64) * steps * PIXELS
    tokens += chunk * t_stride
    gradient += chunk * g_stride
    real = c < D
    zero = tl.zeros([PIXELS, CHANNELS], tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    of_bias = zero
    top = tl.program_id(0) * (TAPS // K)
    for step in range(steps):
        here = step * PIXELS + local
        pixel = tl.program_id(2) * steps * PIXELS + here
        known = pixel < pixels
        x, y = pixel % w, (pixel // w) % h
        place = (here * g_stride)[:, None] + c[None, :]
        g = tl.load(gradient + place, mask=known[:, None] & real[None, :], other=0.0)
        g = g.to(tl.float32)
        of_bias += g
        s0 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 0, K)
        s1 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 1, K)
        s2 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 2, K)
        s3 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 3, K)
        s4 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 4, K)
        if TAPS > 5:
            s5 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 5, K)
            s6 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 6, K)
        if TAPS > 7:
            s7 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 7, K)
            s8 += g * _neighbour(tokens, here, x, y, h, w, known, c, real, t_stride, top, 8, K)
    sums += tl.program_id(2).to(tl.int64) * (K * K + 1) * D + c
    if top == 0:
        tl.store(sums + K * K * D, tl.sum(of_bias, axis=0), mask=real)
    sums += top * K * D
    tl.store(sums, tl.sum(s0, axis=0), mask=real)
    tl.store(sums + D, tl.sum(s1, axis=0), mask=real)
    tl.store(sums + 2 * D, tl.sum(s2, axis=0), mask=real)
    tl.store(sums + 3 * D, tl.sum(s3, axis=0), mask=real)
    tl.store(sums + 4 * D, tl.sum(s4, axis=0), mask=real)
    if TAPS > 5:
        tl.store(sums + 5 * D, tl.sum(s5, axis=0), mask=real)
        tl.store(sums + 6 * D, tl.sum(s6, axis=0), mask=real)
    if TAPS > 7:
        tl.store(sums + 7 * D, tl.sum(s7, axis=0), mask=real)
        tl.store(sums + 8 * D, tl.sum(s8, axis=0), mask=real)


@triton.jit
@no_type_check
def _neighbour(
    tokens, here, x, y, h, w, known, c, real, stride, top, TAP: tl.constexpr, K: tl.constexpr
):
    """What tap number TAP, counted from the first of row `top`, reads."""
    down = top + TAP // K - K // 2
    right = TAP % K - K // 2
    inside = known & (y + down >= 0) & (y + down < h) & (x + right >= 0) & (x + right < w)
    place = (here + down * w + right) * stride
    mask = inside[:, None] & real[None, :]
    return tl.load(tokens + place[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
