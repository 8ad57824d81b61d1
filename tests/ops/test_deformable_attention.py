"""Deformable attention against the plain definition: four corners, point by point."""

import math

import pytest
import torch

from segmill.errors import SegmillError
from segmill.ops.deformable_attention import deformable_attention

SHAPES = [(5, 3), (2, 4), (1, 1)]


def _inputs(dtype=torch.float64, *, batch=2, queries=4, heads=2, width=3, points=2):
    """Locations reach beyond the edges."""
    draw = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, cells, heads, width, generator=draw)
    locations = 1.6 * torch.rand(batch, queries, heads, len(SHAPES), points, 2, generator=draw)
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, generator=draw)
    return value.to(dtype), (locations - 0.3).to(dtype), weights.to(dtype)


def _read(level, x, y):
    """(heads, D) of one map (h, w, heads, D) at (x, y) in 0..1; zero outside."""
    h, w = level.shape[:2]
    column, row = x * w - 0.5, y * h - 0.5
    total = torch.zeros_like(level[0, 0])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * level[i, j]
    return total


def _plain(value, locations, weights):
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    result = torch.zeros(batch, queries, heads, width, dtype=value.dtype)
    start = 0
    for index, (h, w) in enumerate(SHAPES):
        level = value[:, start : start + h * w].reshape(batch, h, w, heads, width)
        start += h * w
        for b, q, head, point in torch.cartesian_prod(
            *(torch.arange(n) for n in (batch, queries, heads, points))
        ).tolist():
            x, y = locations[b, q, head, index, point].tolist()
            share = weights[b, q, head, index, point]
            result[b, q, head] += share * _read(level[b], x, y)[head]
    return result.flatten(2)


def test_it_is_the_definition():
    value, locations, weights = _inputs()
    result = deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(result, _plain(value, locations, weights), rtol=1e-12, atol=1e-12)


def test_all_three_inputs_get_their_gradient():
    value, locations, weights = _inputs(batch=1, queries=3)
    inputs = [each.requires_grad_() for each in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda value, *points: deformable_attention(value, SHAPES, *points), inputs
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_half_values_are_summed_in_float32(autocast):
    value, locations, weights = _inputs(torch.float32)
    half = value.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = deformable_attention(half, SHAPES, locations, weights)
    exact = deformable_attention(half.float(), SHAPES, locations, weights)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, exact.bfloat16())


def test_shapes_that_do_not_add_up_are_named():
    value, locations, weights = _inputs()
    with pytest.raises(SegmillError, match="24 cells, but value has 24, and the locations are on"):
        deformable_attention(value, [(5, 4), (2, 2)], locations, weights)
    with pytest.raises(SegmillError, match="23 cells, but value has 24"):
        deformable_attention(value, [(5, 3), (2, 4)], locations, weights)
