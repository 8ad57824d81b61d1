"""Multi-scale deformable attention: every query reads a few points of every feature map.

On CUDA by Triton kernels that never write what was read; elsewhere by torch's own sampling.
Paper: Zhu et al., "Deformable DETR", ICLR 2021 (https://arxiv.org/abs/2010.04159), equation 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from segmill.errors import SegmillError


def deformable_attention(
    value: Float[Tensor, "B N heads D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q heads L P 2"],
    weights: Float[Tensor, "B Q heads L P"],
) -> Float[Tensor, "B Q C"]:
    """Weighted sums of bilinearly read points; C = heads * D, in the type of `value`.

    `value` holds the maps of all levels one after another, each row by row, with the (height,
    width) of `shapes`. A location is (x, y), 0..1 from edge to edge of its level's map; outside of
    it lie zeros. The weights are used as they come, usually softmaxed over levels and points.
    Locations and weights may be of a finer type than the values; the sums are float32 at least.
    """
    _check_sizes(value, shapes, locations)
    real = torch.promote_types(torch.promote_types(value.dtype, weights.dtype), torch.float32)
    if value.is_cuda and real == torch.float32:
        # Imported here: triton is absent from CPU builds of torch.
        from segmill.ops.triton_deformable_attention import DeformableAttentionCuda

        sizes = tuple((int(height), int(width)) for height, width in shapes)
        return DeformableAttentionCuda.apply(value, sizes, locations, weights)
    return _plain(value.to(real), shapes, locations.to(real), weights.to(real)).to(value.dtype)


def _plain(
    value: Float[Tensor, "B N heads D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q heads L P 2"],
    weights: Float[Tensor, "B Q heads L P"],
) -> Float[Tensor, "B Q C"]:
    B, _, heads, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    maps = value.permute(0, 2, 3, 1).reshape(B * heads, D, -1)
    grids = (2 * locations - 1).transpose(1, 2).reshape(B * heads, Q, -1, P, 2)
    levels = maps.split([h * w for h, w in shapes], 2)
    points = [
        F.grid_sample(level.reshape(B * heads, D, h, w), grids[:, :, index], align_corners=False)
        for index, (level, (h, w)) in enumerate(zip(levels, shapes, strict=True))
    ]
    share = weights.transpose(1, 2).reshape(B * heads, 1, Q, -1)
    total = (torch.stack(points, 3).flatten(3) * share).sum(3)
    return total.reshape(B, heads * D, Q).transpose(1, 2)


def _check_sizes(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor) -> None:
    cells = sum(height * width for height, width in shapes)
    if cells != value.shape[1] or len(shapes) != locations.shape[3]:
        raise SegmillError(
            f"The levels {list(shapes)} have {cells} cells, but value has {value.shape[1]}, and "
            f"the locations are on {locations.shape[3]} levels. Hand in one shape for each level."
        )
