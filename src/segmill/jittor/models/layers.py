"""Layers with the parameter names and the numbers of torch's.

Jittor's own differ: its BatchNorm keeps the biased variance, its LayerNorm takes the variance in
one pass, its adaptive pooling has windows of one size. Initial weights are torch's defaults, drawn
from `segmill.jittor.random`.
"""

import math
from collections.abc import Sequence
from functools import cache

import jittor as jt
import numpy as np
from jaxtyping import Float, Shaped
from jittor import nn

from segmill.jittor import random


def constant(array: Shaped[np.ndarray, "..."]) -> jt.Var:
    """The array in the graph, float32 or int32, without a gradient."""
    return jt.array(array).stop_grad()


def filled(shape: int | Sequence[int], value: float) -> Float[jt.Var, "..."]:
    """That value everywhere; an array as after loading and updating, not an operation."""
    return jt.array(np.full(shape, value, np.float32))


def uniform_weight(shape: Sequence[int], bound: float) -> jt.Var:
    """Initial values between -bound and bound."""
    return jt.array((2 * random.uniform(shape) - 1) * np.float32(bound))


class Linear(jt.Module):
    """The last axis mapped to `out_channels`.

    As A B, for which Jittor has fast loops, not as A B^T, for which only oneDNN has.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        bound = 1 / math.sqrt(in_channels)
        self.weight = uniform_weight((out_channels, in_channels), bound)
        self.bias = uniform_weight((out_channels,), bound)

    def execute(self, tokens: Float[jt.Var, "*size D"]) -> Float[jt.Var, "*size E"]:
        return jt.matmul(tokens, self.weight.transpose(1, 0)) + self.bias


class Conv2d(nn.Conv2d):
    """Jittor's convolution with a square kernel and padding that keeps the size at stride 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups)
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        self.weight = uniform_weight(tuple(self.weight.shape), bound)
        self.bias = uniform_weight((out_channels,), bound)


class PointwiseConv(jt.Module):
    """A 1 x 1 convolution as a product of matrices: Jittor's own is 30 times slower."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        bound = 1 / math.sqrt(in_channels)
        self.weight = uniform_weight((out_channels, in_channels, 1, 1), bound)
        self.bias = uniform_weight((out_channels,), bound) if bias else None

    def execute(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B E h w"]:
        return pointwise(feature, self.weight, self.bias)


def pointwise(
    feature: Float[jt.Var, "B D h w"],
    weight: Float[jt.Var, "E D 1 1"],
    bias: Float[jt.Var, " E"] | None,
) -> Float[jt.Var, "B E h w"]:
    """The 1 x 1 convolution with that weight."""
    out_channels, in_channels = weight.shape[:2]
    matrix = weight.reshape(out_channels, in_channels).transpose(1, 0)
    tokens = jt.matmul(feature.transpose(0, 2, 3, 1), matrix)
    return (tokens if bias is None else tokens + bias).transpose(0, 3, 1, 2)


class BatchNorm2d(jt.Module):
    """Over batch and pixels. The running variance is that of the population, as torch keeps it.

    `num_batches_tracked` stays outside of the graph, which has no 64-bit integers.
    """

    buffers = ("running_mean", "running_var", "num_batches_tracked")
    momentum = 0.1

    def __init__(self, channels: int, *, eps: float) -> None:
        self.eps = eps
        self.weight, self.bias = filled(channels, 1.0), filled(channels, 0.0)
        self.running_mean = filled(channels, 0.0).stop_grad()
        self.running_var = filled(channels, 1.0).stop_grad()
        self.num_batches_tracked = np.zeros((), np.int64)

    def execute(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B D h w"]:
        if not self.is_training():
            return self._scaled(feature - _per_channel(self.running_mean), self.running_var)
        mean = feature.mean(dims=(0, 2, 3))
        centred = feature - _per_channel(mean)
        variance = (centred * centred).mean(dims=(0, 2, 3))
        self._track(mean, variance, feature.numel() // feature.shape[1])
        return self._scaled(centred, variance)

    def _scaled(self, centred: jt.Var, variance: jt.Var) -> jt.Var:
        scale = self.weight / jt.sqrt(variance + self.eps)
        return centred * _per_channel(scale) + _per_channel(self.bias)

    def _track(self, mean: jt.Var, variance: jt.Var, count: int) -> None:
        # Of one value there is no variance of the population; torch refuses, this keeps the rest.
        unbiased = constant(np.full(variance.shape[0], count / max(count - 1, 1), np.float32))
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, variance * unbiased),
        ):
            # In float64: how Jittor fuses this with its neighbours must not decide the last bit.
            kept = running.float64() * (1 - self.momentum) + new.float64() * self.momentum
            running.update(kept.float32())
        self.num_batches_tracked += 1


def _per_channel(values: Float[jt.Var, " D"]) -> Float[jt.Var, "1 D 1 1"]:
    return values.reshape(1, -1, 1, 1)


class LayerNorm(jt.Module):
    """Over the last axis, the variance in a second pass."""

    def __init__(self, width: int, *, eps: float) -> None:
        self.eps = eps
        self.weight, self.bias = filled(width, 1.0), filled(width, 0.0)

    def execute(self, tokens: Float[jt.Var, "*size D"]) -> Float[jt.Var, "*size D"]:
        centred = tokens - tokens.mean(dim=-1, keepdims=True)
        variance = (centred * centred).mean(dim=-1, keepdims=True)
        return centred / jt.sqrt(variance + self.eps) * self.weight + self.bias


class ConvBNAct(jt.Module):
    """1 x 1 convolution without bias, BatchNorm and, if `activated`, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, *, eps: float, activated: bool = True
    ) -> None:
        self.conv = PointwiseConv(in_channels, out_channels, bias=False)
        self.bn = BatchNorm2d(out_channels, eps=eps)
        self.activated = activated

    def execute(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B E h w"]:
        return self.activate(self.bn(self.conv(feature)))

    def activate(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B D h w"]:
        """What follows the norm."""
        return nn.relu(feature) if self.activated else feature


class GELU(jt.Module):
    """The exact one, as a member of a sequence."""

    def execute(self, feature: Float[jt.Var, "*size"]) -> Float[jt.Var, "*size"]:
        return nn.gelu(feature)


class DropPath(jt.Module):
    """Drop a residual branch for some samples of the batch, with probability `rate`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def execute(self, branch: Float[jt.Var, "B *size"]) -> Float[jt.Var, "B *size"]:
        if not self.is_training() or self.rate == 0.0:
            return branch
        batch, *ones, width = branch.shape
        kept = _kept((batch, *[1] * len(ones), 1), self.rate)
        # Of one number Jittor would compile a kernel for its value.
        return branch * constant(np.repeat(kept, width, axis=-1))


class Dropout2d(jt.Module):
    """Drop whole channels of a map, each with probability `rate`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def execute(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B D h w"]:
        if not self.is_training() or self.rate == 0.0:
            return feature
        return feature * constant(_kept((*feature.shape[:2], 1, 1), self.rate))


def _kept(shape: Sequence[int], rate: float) -> Float[np.ndarray, "..."]:
    """0 with probability `rate`, else the factor that keeps the mean."""
    keep = 1.0 - rate
    return np.floor(random.uniform(shape) + np.float32(keep)) / np.float32(keep)


def resize(
    feature: Float[jt.Var, "B D h w"], size: Sequence[int], *, align_corners: bool = False
) -> Float[jt.Var, "B D H W"]:
    """Bilinear. The default is the convention of every network here."""
    height, width = feature.shape[-2:]
    if (height, width) == tuple(size):
        return feature
    rows = interpolation(height, size[0], align_corners)
    return between_grids(feature, rows, interpolation(width, size[1], align_corners))


def adaptive_average_pool(
    feature: Float[jt.Var, "B D h w"], grid: int
) -> Float[jt.Var, "B D _g _g"]:
    """Averages over grid x grid cells, which overlap where the size does not divide."""
    height, width = feature.shape[-2:]
    return between_grids(feature, averaging(height, grid), averaging(width, grid))


def between_grids(
    feature: Float[jt.Var, "B D h w"],
    rows: Float[np.ndarray, "H h"],
    columns: Float[np.ndarray, "W w"],
) -> Float[jt.Var, "B D H W"]:
    """Each row of a matrix says of which old rows (columns) a new one is the weighted sum."""
    wide = jt.matmul(feature, constant(columns.T.copy()))
    return jt.matmul(wide.transpose(0, 1, 3, 2), constant(rows.T.copy())).transpose(0, 1, 3, 2)


@cache
def interpolation(old: int, new: int, align_corners: bool) -> Float[np.ndarray, "new old"]:
    """Linear interpolation of `old` points at `new` ones, as torch places them."""
    if align_corners:
        source = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        source = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(source.astype(int), old - 1)
    weights = np.zeros((new, old))
    weights[np.arange(new), low] += 1 - (source - low)
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += source - low
    return weights.astype(np.float32)


@cache
def averaging(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Cell i is the mean from floor(i old / new) up to ceil((i + 1) old / new)."""
    weights = np.zeros((new, old))
    for cell in range(new):
        start, stop = cell * old // new, -(-(cell + 1) * old // new)
        weights[cell, start:stop] = 1 / (stop - start)
    return weights.astype(np.float32)
