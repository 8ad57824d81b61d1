"""Addition in place on CUDA; the plain counterpart says what."""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of a program: 16 a thread
WARPS = {"num_warps": 4}


def accumulate_cuda(total: Tensor, part: Tensor) -> None:
    """Of contiguous tensors of one shape; the sum is that of float32."""
    count = total.numel()
    if count:
        _add[(triton.cdiv(count, BLOCK),)](total, part, count, BLOCK=BLOCK, **WARPS)
    # The kernel is no operation of torch: whoever saved the sum learns of its change here.
    torch.autograd.graph.increment_version(total)


@triton.jit
@no_type_check
def _add(total, part, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(total + at, mask=mask).to(tl.float32)
    value += tl.load(part + at, mask=mask).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=mask)
