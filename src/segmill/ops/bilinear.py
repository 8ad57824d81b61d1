"""The weights of bilinear interpolation along one axis, as torch computes them."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def taps(
    source: int, target: int, *, align_corners: bool, dtype: torch.dtype
) -> tuple[Int[np.ndarray, " target"], Float[np.ndarray, " target"]]:
    """For each of `target` positions the lower of its two source positions, and the upper's weight.

    The upper one is the next; at the end of the axis there is none and the weight is 0.
    """
    real = np.float64 if dtype == torch.float64 else np.float32
    index = np.arange(target, dtype=real)
    if align_corners:
        position = index * (real(source - 1) / real(max(target - 1, 1)))
    else:
        position = (index + real(0.5)) * (real(source) / real(target)) - real(0.5)
    position = np.clip(position, 0, source - 1)
    lower = position.astype(np.int64)
    return lower, (position - lower).astype(real)


@dataclass(frozen=True)
class DeviceTaps:
    """The weights in the form of the kernels.

    `lower`, `weight`: of each target position. `start[i]`: the first target position whose lower
    source is i or more, so that start[i]:start[i + 1] lie between i and i + 1.
    """

    lower: Int[Tensor, " target"]
    weight: Float[Tensor, " target"]
    start: Int[Tensor, " starts"]


@lru_cache(maxsize=64)
def device_taps(
    source: int, target: int, *, align_corners: bool, device: torch.device
) -> DeviceTaps:
    """Made once per pair of sizes: launching kernels waits for no copy."""
    lower, weight = taps(source, target, align_corners=align_corners, dtype=torch.float32)
    start = np.searchsorted(lower, np.arange(source + 1))
    arrays = lower.astype(np.int32), weight, start.astype(np.int32)
    return DeviceTaps(*(torch.from_numpy(array).to(device) for array in arrays))


@lru_cache(maxsize=64)
def interpolation_matrix(
    source: int, target: int, *, align_corners: bool, dtype: torch.dtype
) -> Float[Tensor, "target source"]:
    """The same weights as a dense matrix on the CPU: two entries in each row."""
    lower, weight = taps(source, target, align_corners=align_corners, dtype=dtype)
    matrix = np.zeros((target, source), weight.dtype)
    rows = np.arange(target)
    matrix[rows, lower] += 1 - weight
    matrix[rows, np.minimum(lower + 1, source - 1)] += weight
    return torch.from_numpy(matrix)


# (target rows, source rows they read, weights of the one in the other)
RowChunk = tuple[slice, slice, Float[Tensor, "_chunk _span"]]


def row_chunks(matrix: Float[Tensor, "target source"], rows: int) -> list[RowChunk]:
    """Cut the target axis in chunks of `rows`."""
    target, source = matrix.shape
    touched = matrix != 0
    first = touched.int().argmax(1).tolist()
    last = (source - touched.flip(1).int().argmax(1)).tolist()
    chunks = []
    for start in range(0, target, rows):
        stop = min(start + rows, target)
        span = slice(first[start], last[stop - 1])
        chunks.append((slice(start, stop), span, matrix[start:stop, span].contiguous()))
    return chunks
