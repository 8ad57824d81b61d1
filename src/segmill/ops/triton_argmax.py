"""The class map of bilinearly upsampled logits on CUDA: the running best of each pixel.

A program takes the pixels between two neighbouring rows of logits, for some columns of pixels;
they share the logits at their corners.
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from segmill.ops.bilinear import device_taps

COLUMNS = 32  # a warp; one warp a program keeps the rows of a column in one thread


def upsample_argmax_cuda(
    logits: Float[Tensor, "B K h w"],
    size: tuple[int, int],
    *,
    align_corners: bool,
    dtype: torch.dtype,
) -> UInt8[Tensor, "B H W"] | Int[Tensor, "B H W"]:
    """See `upsample_argmax`."""
    logits = logits.contiguous()
    B, K, h, w = logits.shape
    H, W = size
    rows = device_taps(h, H, align_corners=align_corners, device=logits.device)
    columns = device_taps(w, W, align_corners=align_corners, device=logits.device)
    pred = torch.empty((B, H, W), dtype=dtype, device=logits.device)
    _argmax[(triton.cdiv(W, COLUMNS), h, B)](
        pred,
        logits,
        rows.start,
        rows.weight,
        columns.lower,
        columns.weight,
        h,
        w,
        H,
        W,
        K=K,
        ROWS=triton.next_power_of_2(min(max(H // h, 1), 8)),
        COLUMNS=COLUMNS,
        num_warps=1,  # pyright: ignore[reportCallIssue] - the launcher's
    )
    return pred


@triton.jit
@no_type_check
def _argmax(
    pred,
    logits,
    row_start,
    row_weight,
    column_lower,
    column_weight,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
    pred += image * H * W
    end = tl.load(row_start + cell + 1)
    for first in range(tl.load(row_start + cell), end, ROWS):
        row = first + tl.arange(0, ROWS)
        fy = tl.load(row_weight + row, mask=row < end, other=0.0)[:, None]
        best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        winner = tl.zeros([ROWS, COLUMNS], tl.int32)
        for k in tl.range(K, loop_unroll_factor=4):
            plane = k * h * w
            top_left = tl.load(top + plane + left).to(tl.float32)
            top_right = tl.load(top + plane + right).to(tl.float32)
            bottom_left = tl.load(bottom + plane + left).to(tl.float32)
            bottom_right = tl.load(bottom + plane + right).to(tl.float32)
            upper = (1 - fx) * top_left + fx * top_right
            lower = (1 - fx) * bottom_left + fx * bottom_right
            z = (1 - fy) * upper[None, :] + fy * lower[None, :]
            # Strictly larger: the lowest class keeps a tie.
            winner = tl.where(z > best, k, winner)
            best = tl.maximum(best, z)
        pixel = row[:, None] * W + column[None, :]
        used = (row < end)[:, None] & inside[None, :]
        tl.store(pred + pixel, winner.to(pred.dtype.element_ty), mask=used)
