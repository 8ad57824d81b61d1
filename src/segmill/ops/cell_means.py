"""Adaptive average pooling of a map of tokens to a square grid of cells.

On CUDA by Triton kernels, which read channels-last maps as they lie and add nothing atomically, so
that gradients are the same each time; elsewhere torch's operation.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cell_means(tokens: Float[Tensor, "B h w D"], grid: int) -> Float[Tensor, "B cells D"]:
    """Means over grid x grid cells, row by row; cells overlap where the size does not divide."""
    if not _has_kernel(tokens, grid):
        means = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), grid)
        return means.permute(0, 2, 3, 1).flatten(1, 2)
    # Imported here: triton is absent from CPU builds of torch.
    from segmill.ops.triton_cell_means import CellMeansCuda

    return CellMeansCuda.apply(tokens, grid)


def _has_kernel(tokens: Tensor, grid: int) -> bool:
    real = (torch.float32, torch.bfloat16, torch.float16)
    return tokens.is_cuda and tokens.dtype in real and min(tokens.shape[1:3]) >= grid
