"""Cross-entropy of bilinearly upsampled logits on CUDA; the CPU's counterpart says what and why.

Between two neighbouring rows and columns of logits lies an interval of pixels that share their four
corners. Forward: a program takes the pixels between two rows of logits, for some columns of pixels,
and goes over the classes twice (maximum, then sum of exponentials). Backward: a program takes some
classes and some columns of logits, goes down the rows, and gathers what the pixels around each
logit contribute; nothing is added atomically, so the result is deterministic. Pixels between two
columns are visited from both, pixels between two rows once.
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from segmill.ops.bilinear import device_taps

COLUMNS = 32  # a warp; one warp a program keeps the rows or classes of a column in one thread
CLASSES = 8  # of one program of the backward pass
STRIP = 8  # rows of logits that one program of the backward pass goes down


class UpsampleCrossEntropyCuda(torch.autograd.Function):
    """(sum of the losses, sum of the weights of the counted pixels), both float64."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        class_weight: Tensor,
        align_corners: bool,
        ignore_index: int,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """A label outside the classes makes the loss NaN: raising would mean waiting."""
        logits, label = logits.contiguous(), label.contiguous()
        class_weight = class_weight.float()
        B, K, h, w = logits.shape
        _, H, W = label.shape
        rows = device_taps(h, H, align_corners=align_corners, device=logits.device)
        columns = device_taps(w, W, align_corners=align_corners, device=logits.device)
        offset = torch.empty(label.shape, device=logits.device)
        grid = (triton.cdiv(W, COLUMNS), h, B)
        loss, weight = torch.empty((2, B, h, grid[0]), device=logits.device)
        smooth = label_smoothing / K
        _forward[grid](
            logits,
            label,
            class_weight,
            class_weight.sum(),
            rows.start,
            rows.weight,
            columns.lower,
            columns.weight,
            offset,
            loss,
            weight,
            h,
            w,
            H,
            W,
            ignore_index,
            1 - label_smoothing,
            smooth,
            K=K,
            ROWS=triton.next_power_of_2(min(max(H // h, 1), 8)),
            COLUMNS=COLUMNS,
            SMOOTH=label_smoothing > 0,
            num_warps=1,  # pyright: ignore[reportCallIssue] - the launcher's
        )
        ctx.save_for_backward(logits, label, class_weight, offset)
        ctx.align_corners, ctx.smoothing = align_corners, label_smoothing
        loss, weight = loss.sum(dtype=torch.float64), weight.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(weight)
        return loss, weight

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Recomputes the upsampled logits instead of keeping them."""
        logits, label, class_weight, offset = ctx.saved_tensors
        B, K, h, w = logits.shape
        _, H, W = label.shape
        rows = device_taps(h, H, align_corners=ctx.align_corners, device=logits.device)
        columns = device_taps(w, W, align_corners=ctx.align_corners, device=logits.device)
        gradient = torch.empty_like(logits)
        chunks = triton.cdiv(K, CLASSES)
        _backward[(triton.cdiv(w, COLUMNS), triton.cdiv(h, STRIP), B * chunks)](
            gradient,
            gradients[0].float(),
            logits,
            label,
            offset,
            class_weight,
            rows.start,
            rows.weight,
            columns.start,
            columns.weight,
            h,
            w,
            H,
            W,
            1 - ctx.smoothing,
            ctx.smoothing / K,
            K=K,
            CHUNKS=chunks,
            CLASSES=CLASSES,
            COLUMNS=COLUMNS,
            STRIP=STRIP,
            SMOOTH=ctx.smoothing > 0,
            num_warps=1,  # pyright: ignore[reportCallIssue] - the launcher's
        )
        return gradient, None, None, None, None, None


@triton.jit
@no_type_check
def _forward(
    logits, label, class_weight, weight_total, row_start, row_weight, column_lower, column_weight,
    offset, loss_sums, weight_sums, h, w, H, W, ignore_index, keep, smooth,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    cell = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    inside = column < W
    left = tl.load(column_lower + column, mask=inside, other=0)
    right = tl.minimum(left + 1, w - 1)
    fx = tl.load(column_weight + column, mask=inside, other=0.0)
    # 64-bit arithmetic on the base addresses only; offsets inside an image fit 32 bits.
    logits += image * K * h * w
    top, bottom = logits + cell * w, logits + tl.minimum(cell + 1, h - 1) * w
    label += image * H * W
    offset += image * H * W
    loss_tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    weight_tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    end = tl.load(row_start + cell + 1)
    for first in range(tl.load(row_start + cell), end, ROWS):
        row = first + tl.arange(0, ROWS)
        used = (row < end)[:, None] & inside[None, :]
        fy = tl.load(row_weight + row, mask=row < end, other=0.0)[:, None]
        pixel = row[:, None] * W + column[None, :]
        y = tl.load(label + pixel, mask=used, other=0).to(tl.int32)
        peak, total, hit, linear = _over_classes(
            top, bottom, h * w, left, right, fx, fy, y, class_weight, K, SMOOTH
        )
        valid = used & (y != ignore_index)
        known = valid & (y >= 0) & (y < K)
        own_weight = tl.load(class_weight + y, mask=known, other=0.0)
        mass = keep * own_weight + smooth * tl.load(weight_total)
        loss = mass * tl.log(total) - keep * own_weight * hit - smooth * linear
        loss = tl.where(valid & (known == 0), float("nan"), loss)
        loss_tile += tl.where(valid, loss, 0.0)
        weight_tile += own_weight
        # exp(z - offset) is the probability times the mass; 0 where the pixel does not count.
        counts = known & (mass > 0)
        shift = peak + tl.log(total) - tl.log(tl.where(counts, mass, 1.0))
        tl.store(offset + pixel, tl.where(counts, shift, float("inf")), mask=used)
    program = (image * h + cell) * tl.num_programs(0) + tl.program_id(0)
    tl.store(loss_sums + program, tl.sum(tl.sum(loss_tile, axis=1), axis=0))
    tl.store(weight_sums + program, tl.sum(tl.sum(weight_tile, axis=1), axis=0))


@triton.jit
@no_type_check
def _over_classes(
    top, bottom, plane, left, right, fx, fy, y, class_weight, K: tl.constexpr, SMOOTH: tl.constexpr
):
    """Maximum, sum of exponentials, own and weighted logits; all but the first from the first."""
    peak = tl.full(y.shape, float("-inf"), tl.float32)
    for k in tl.range(K, loop_unroll_factor=4):
        peak = tl.maximum(peak, _between(top, bottom, k * plane, left, right, fx, fy))
    total = tl.zeros(y.shape, tl.float32)
    hit = tl.zeros(y.shape, tl.float32)
    linear = tl.zeros(y.shape, tl.float32)
    for k in tl.range(K, loop_unroll_factor=4):
        z = _between(top, bottom, k * plane, left, right, fx, fy) - peak
        total += tl.exp(z)
        hit = tl.where(y == k, z, hit)
        if SMOOTH:
            linear += tl.load(class_weight + k) * z
    return peak, total, hit, linear


@triton.jit
@no_type_check
def _between(top, bottom, plane, left, right, fx, fy):
    """Upsampled logits (rows, columns) of one class between two rows of logits."""
    top_left = tl.load(top + plane + left).to(tl.float32)
    top_right = tl.load(top + plane + right).to(tl.float32)
    bottom_left = tl.load(bottom + plane + left).to(tl.float32)
    bottom_right = tl.load(bottom + plane + right).to(tl.float32)
    upper = top_left + fx * (top_right - top_left)
    lower = bottom_left + fx * (bottom_right - bottom_left)
    return upper[None, :] + fy * (lower - upper)[None, :]


@triton.jit
@no_type_check
def _backward(
    gradient, scale, logits, label, offset, class_weight,
    row_start, row_weight, column_start, column_weight, h, w, H, W, keep, smooth,
    K: tl.constexpr, CHUNKS: tl.constexpr, CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr, STRIP: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    strip = tl.program_id(1) * STRIP
    image = (tl.program_id(2) // CHUNKS).to(tl.int64)
    k = (tl.program_id(2) % CHUNKS) * CLASSES + tl.arange(0, CLASSES)[:, None]
    inside = (k < K) & (j < w)[None, :]
    # 64-bit arithmetic on the base addresses only; offsets inside an image fit 32 bits.
    logits += image * K * h * w
    gradient += image * K * h * w
    label += image * H * W
    offset += image * H * W
    plane = k * h * w
    weight_k = tl.load(class_weight + k, mask=k < K, other=0.0)
    # Pixel columns left of j: from `before` up to `own`; right of it: from `own` up to `after`.
    own = tl.load(column_start + j, mask=j < w, other=0)
    before = tl.load(column_start + j - 1, mask=(j > 0) & (j < w), other=0)
    before = tl.where(j > 0, before, own)
    after = tl.load(column_start + j + 1, mask=j < w, other=0)
    left = plane + tl.maximum(j - 1, 0)[None, :]
    middle = plane + j[None, :]
    right = plane + tl.minimum(j + 1, w - 1)[None, :]
    factor = tl.load(scale)
    from_above = tl.zeros([CLASSES, COLUMNS], tl.float32)
    for i in range(tl.maximum(strip - 1, 0), tl.minimum(strip + STRIP, h)):
        here, below = logits + i * w, logits + tl.minimum(i + 1, h - 1) * w
        top_left, top_middle, top_right = _three(here, left, middle, right, inside)
        bottom_left, bottom_middle, bottom_right = _three(below, left, middle, right, inside)
        to_row = tl.zeros([CLASSES, COLUMNS], tl.float32)
        to_next = tl.zeros([CLASSES, COLUMNS], tl.float32)
        for row in range(tl.load(row_start + i), tl.load(row_start + i + 1)):
            fy = tl.load(row_weight + row)
            z_left = top_left + fy * (bottom_left - top_left)
            z_middle = top_middle + fy * (bottom_middle - top_middle)
            z_right = top_right + fy * (bottom_right - top_right)
            total = _along_row(
                z_left, z_middle, z_right, label + row * W, offset + row * W, column_weight,
                before, own, after, k, weight_k, keep, smooth, SMOOTH,
            )  # fmt: skip
            to_row += (1 - fy) * total
            to_next += fy * total
        value = (factor * (from_above + to_row)).to(gradient.dtype.element_ty)
        # The row above the strip only hands down its share.
        tl.store(gradient + i * w + middle, value, mask=inside & (i >= strip))
        from_above = to_next


@triton.jit
@no_type_check
def _along_row(
    z_left, z_middle, z_right, label, offset, column_weight,
    before, own, after, k, weight_k, keep, smooth, SMOOTH: tl.constexpr,
):  # fmt: skip
    """What the pixels of one row give to each (class, column)."""
    total = tl.zeros(z_middle.shape, tl.float32)
    for t in range(tl.max(tl.maximum(own - before, after - own), axis=0)):
        x = before + t
        fx = tl.load(column_weight + x, mask=x < own, other=0.0)[None, :]
        z = z_left + fx * (z_middle - z_left)
        total += fx * _pixel_gradient(
            z, k, label + x, offset + x, x < own, weight_k, keep, smooth, SMOOTH
        )
        x = own + t
        fx = tl.load(column_weight + x, mask=x < after, other=0.0)[None, :]
        z = z_middle + fx * (z_right - z_middle)
        total += (1 - fx) * _pixel_gradient(
            z, k, label + x, offset + x, x < after, weight_k, keep, smooth, SMOOTH
        )
    return total


@triton.jit
@no_type_check
def _three(row, left, middle, right, inside):
    """Logits (classes, columns) of a row: of the column before, this one and the next."""
    before = tl.load(row + left, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(row + middle, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(row + right, mask=inside, other=0.0).to(tl.float32)
    return before, own, after


@triton.jit
@no_type_check
def _pixel_gradient(z, k, label, offset, used, weight_k, keep, smooth, SMOOTH: tl.constexpr):
    """Mass x probability - target at one pixel for each (class, column)."""
    shift = tl.load(offset, mask=used, other=float("inf"))[None, :]
    y = tl.load(label, mask=used, other=0).to(tl.int32)[None, :]
    counts = shift < float("inf")
    target = tl.where((y == k) & counts, keep * weight_k, 0.0)
    if SMOOTH:
        target += tl.where(counts, smooth * weight_k, 0.0)
    return tl.exp(z - shift) - target
