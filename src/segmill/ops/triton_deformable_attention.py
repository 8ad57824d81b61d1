"""Multi-scale deformable attention on CUDA; the plain counterpart says what.

A row is one head of one query; a program takes some rows, whose D values lie together in memory.
Nothing of the size rows x levels x points x D is written. Backward: what a point gives to its four
cells is added atomically in float32, so the last bits of the values' gradient differ between runs;
the other two gradients, and everything forward, do not.
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from functools import cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 8  # of one program; with one warp the fastest of nine shapes on an H200
WARPS = 1


class DeformableAttentionCuda(torch.autograd.Function):
    """Sums (B, Q, heads * D) in the type of the values, accumulated in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        shapes: tuple[tuple[int, int], ...],
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """`value` (B, N, heads, D), `locations` (B, Q, heads, L, P, 2), `weights` without the 2."""
        value, locations, weights = (each.contiguous() for each in (value, locations, weights))
        B, Q, heads = weights.shape[:3]
        result = value.new_empty(B, Q, heads * value.shape[3])
        sizes = _sizes(value, weights)
        _forward[(triton.cdiv(B * Q * heads, ROWS),)](
            value, _levels(shapes, value.device), locations, weights, result, **sizes
        )
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Reads the values again instead of keeping what was read."""
        value, locations, weights = ctx.saved_tensors
        B, Q, heads = weights.shape[:3]
        to_value = torch.zeros_like(value, dtype=torch.float32)
        to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
        _backward[(triton.cdiv(B * Q * heads, ROWS),)](
            gradients[0].contiguous(),
            value,
            _levels(ctx.shapes, value.device),
            locations,
            weights,
            to_value,
            to_locations,
            to_weights,
            **_sizes(value, weights),
        )
        return to_value.to(value.dtype), None, to_locations, to_weights


def _sizes(value: Tensor, weights: Tensor) -> dict[str, int]:
    B, Q, heads, L, P = weights.shape
    _, N, _, D = value.shape
    block = {"ROWS": ROWS, "WIDTH": triton.next_power_of_2(D), "num_warps": WARPS}
    return {"rows": B * Q * heads, "Q": Q, "N": N, "L": L, "heads": heads, "D": D, "P": P, **block}


@cache
def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(height, width, first cell) of each level."""
    table, first = [], 0
    for height, width in shapes:
        table.append((height, width, first))
        first += height * width
    return torch.tensor(table, dtype=torch.int32, device=device)


@triton.jit
@no_type_check
def _forward(
    value, levels, locations, weights, result, rows, Q, N, L,
    heads: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, d, known, inside, value = _rows(value, rows, Q, N, heads, D, ROWS, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for level in range(L):
        h, w, first = _level(levels, level)
        for p in tl.static_range(P):
            point = (row * L + level) * P + p
            share = tl.load(weights + point, mask=known, other=0.0).to(tl.float32)
            i, j, fy, fx = _cell(locations, point, h, w, known)
            here = value + (first + i * w + j)[:, None] * (heads * D)
            above, below, left, right = _sides(i, j, h, w)
            lower = share * fy
            upper = share - lower
            total += (upper - upper * fx)[:, None] * _read(here, inside, above & left)
            total += (upper * fx)[:, None] * _read(here + heads * D, inside, above & right)
            here += w * heads * D
            total += (lower - lower * fx)[:, None] * _read(here, inside, below & left)
            total += (lower * fx)[:, None] * _read(here + heads * D, inside, below & right)
    place = row[:, None] * D + d[None, :]
    tl.store(result + place, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _backward(
    gradient, value, levels, locations, weights, to_value, to_locations, to_weights, rows, Q, N, L,
    heads: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, d, known, inside, to_value = _rows(to_value, rows, Q, N, heads, D, ROWS, WIDTH)
    _, _, _, _, value = _rows(value, rows, Q, N, heads, D, ROWS, WIDTH)
    place = row[:, None] * D + d[None, :]
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    for level in range(L):
        h, w, first = _level(levels, level)
        for p in tl.static_range(P):
            point = (row * L + level) * P + p
            share = tl.load(weights + point, mask=known, other=0.0).to(tl.float32)
            i, j, fy, fx = _cell(locations, point, h, w, known)
            cell = (first + i * w + j)[:, None] * (heads * D)
            above, below, left, right = _sides(i, j, h, w)
            top_left = _read(value + cell, inside, above & left)
            top_right = _read(value + cell + heads * D, inside, above & right)
            next_row = cell + w * heads * D
            bottom_left = _read(value + next_row, inside, below & left)
            bottom_right = _read(value + next_row + heads * D, inside, below & right)
            x, y = fx[:, None], fy[:, None]
            top = top_left + x * (top_right - top_left)
            bottom = bottom_left + x * (bottom_right - bottom_left)
            along_x = top_right - top_left
            along_x += y * (bottom_right - bottom_left - along_x)
            dx = w * share * tl.sum(g * along_x, axis=1)
            dy = h * share * tl.sum(g * (bottom - top), axis=1)
            read = tl.sum(g * (top + y * (bottom - top)), axis=1)
            kind = to_locations.dtype.element_ty
            tl.store(to_weights + point, read.to(to_weights.dtype.element_ty), mask=known)
            tl.store(to_locations + 2 * point, dx.to(kind), mask=known)
            tl.store(to_locations + 2 * point + 1, dy.to(kind), mask=known)
            lower = (share * fy)[:, None] * g
            upper = share[:, None] * g - lower
            _add(to_value + cell, upper - upper * x, inside, above & left)
            _add(to_value + cell + heads * D, upper * x, inside, above & right)
            _add(to_value + next_row, lower - lower * x, inside, below & left)
            _add(to_value + next_row + heads * D, lower * x, inside, below & right)


@triton.jit
@no_type_check
def _rows(
    value, rows, Q, N,
    heads: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """This program's rows and channels, which of them exist, and the first cell of each row."""
    # 64-bit numbers of rows: images x queries x heads x levels x points may pass 32 bits.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    known = row < rows
    inside = known[:, None] & (d < D)[None, :]
    # Offsets inside an image fit 32 bits.
    base = (row // (Q * heads)) * N * (heads * D) + (row % heads) * D
    return row, d, known, inside, value + base[:, None] + d[None, :]


@triton.jit
@no_type_check
def _level(levels, level):
    """Height, width, first cell."""
    entry = levels + 3 * level
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
@no_type_check
def _cell(locations, point, h, w, known):
    """Row and column of the cell above and left of a point, and how far behind them it lies."""
    x = tl.load(locations + 2 * point, mask=known, other=0.0).to(tl.float32) * w - 0.5
    y = tl.load(locations + 2 * point + 1, mask=known, other=0.0).to(tl.float32) * h - 0.5
    # Farther outside there are zeros only, and 32 bits hold the number.
    x = tl.minimum(tl.maximum(x, -2.0), w + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), h + 1.0)
    j, i = tl.floor(x), tl.floor(y)
    return i.to(tl.int32), j.to(tl.int32), y - i, x - j


@triton.jit
@no_type_check
def _sides(i, j, h, w):
    """Whether the cells' upper row, lower row, left column and right column are in the map."""
    return (i >= 0) & (i < h), (i >= -1) & (i < h - 1), (j >= 0) & (j < w), (j >= -1) & (j < w - 1)


@triton.jit
@no_type_check
def _read(cells, inside, exists):
    return tl.load(cells, mask=inside & exists[:, None], other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _add(cells, amount, inside, exists):
    tl.atomic_add(cells, amount, mask=inside & exists[:, None], sem="relaxed")
