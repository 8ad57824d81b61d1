"""Counting (label, prediction) pairs on CUDA.

Neighbouring pixels mostly carry the same pair, and atomic additions to one address queue up. So
neighbours count into different copies of the matrix, which are summed at the end. Integer sums do
not depend on the order.
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

BLOCK = 1024
MOST_COPIES = 32  # the lanes of a warp
MOST_ENTRIES = 2**20  # of all copies together: 4 MiB


def update_confusion_cuda(
    confusion: Int64[Tensor, "K K"],
    label: Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"],
    pred: Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"],
    *,
    ignore_index: int,
) -> None:
    """See `update_confusion`."""
    K = len(confusion)
    copies = min(MOST_COPIES, max(1, MOST_ENTRIES // (K * K)))
    counts = torch.zeros((copies, K, K), dtype=torch.int32, device=confusion.device)
    pixels = label.numel()
    _count[(triton.cdiv(pixels, BLOCK),)](
        counts,
        label.contiguous(),
        pred.contiguous(),
        pixels,
        ignore_index,
        K=K,
        COPIES=copies,
        BLOCK=BLOCK,
    )
    confusion += counts.sum(0)


@triton.jit
@no_type_check
def _count(
    counts,
    label,
    pred,
    pixels,
    ignore_index,
    K: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(label + pixel, mask=pixel < pixels, other=0).to(tl.int32)
    column = tl.load(pred + pixel, mask=pixel < pixels, other=0).to(tl.int32)
    known = (pixel < pixels) & (row != ignore_index) & (row >= 0) & (row < K)
    known = known & (column >= 0) & (column < K)
    entry = (pixel % COPIES) * K * K + row * K + column
    tl.atomic_add(counts + entry, 1, mask=known)
