"""Sums that are wider than what is added: float32 gradients of weights that were used in bfloat16.

On CUDA by a Triton kernel that reads and writes each number once; elsewhere torch's operation.
"""

import torch
from torch import Tensor


def accumulate(total: Tensor, part: Tensor) -> None:
    """`total += part`, in place, whatever the floating types of both."""
    real = (torch.float32, torch.bfloat16, torch.float16)
    alike = total.shape == part.shape and total.is_contiguous() and part.is_contiguous()
    if not (alike and total.is_cuda and part.is_cuda and {total.dtype, part.dtype} <= {*real}):
        total.add_(part)
        return
    # Imported here: triton is absent from CPU builds of torch.
    from segmill.ops.triton_accumulate import accumulate_cuda

    accumulate_cuda(total, part)
