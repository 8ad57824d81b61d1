"""Peers of `dformer`: the published algorithm in plain torch, nothing rearranged. DFormer's trunk.

In v2 every block resizes the depth and makes its own bias and rotation, and attention is a softmax
of a full matrix; v1's norm is its own two-pass class; maps change their layout around each
convolution; the head resizes, concatenates and then convolves; the loss is that of full-size
logits, picked by a boolean index. Parameters have the official names, which are ours too. Written
from a description of the algorithm, for timing and for comparing values only.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Of channels at the end, in elementary operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Two passes: the mean, then the mean square of what is left."""
        centred = x - x.mean(-1, keepdim=True)
        variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
        return self.weight * (centred / torch.sqrt(variance + 1e-6)) + self.bias


class DropPath(nn.Module):
    """Drops samples of a residual branch."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Scaled where it is kept."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        draw = keep + torch.rand(
            (x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device
        )
        return x.div(keep) * draw.floor()


def nchw(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of channels-last tokens."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """v1's."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.fc1 = nn.Linear(width, width * ratio)
        self.pos = nn.Conv2d(width * ratio, width * ratio, 3, padding=1, groups=width * ratio)
        self.fc2 = nn.Linear(width * ratio, width)

    def forward(self, x: Tensor) -> Tensor:
        """One tensor after the other."""
        x = self.fc1(self.norm(x)).permute(0, 3, 1, 2)
        x = (self.pos(x) + x).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class Attention(nn.Module):
    """v1's, of both streams."""

    def __init__(self, width: int, heads: int, *, window: int, last: bool) -> None:
        super().__init__()
        half, merged = width // 2, 2 * width if window else width // 2 * 3
        self.heads, self.window, self.last = heads, window, last
        self.q, self.q_cut = nn.Linear(width, width), nn.Linear(width, half)
        self.l, self.a = nn.Linear(width, width), nn.Linear(width, width)
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.e_conv = nn.Conv2d(half, half, 7, padding=3, groups=half)
        self.e_fore, self.e_back = nn.Linear(half, half), nn.Linear(half, half)
        self.proj = nn.Linear(merged, width)
        if not last:
            self.proj_e = nn.Linear(merged, half)
        if window:
            self.short_cut_linear = nn.Linear(width + half, half)
            self.kv = nn.Linear(width, width)
            self.pool = nn.AdaptiveAvgPool2d(window)
        self.norm, self.norm_e = LayerNorm(width), LayerNorm(half)

    def forward(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Colour, depth."""
        x, e = self.norm(x), self.norm_e(e)
        batch, height, width, channels = x.shape
        short_cut = torch.cat([x, e], dim=3).permute(0, 3, 1, 2) if self.window else None
        q, cut = self.q(x), self.q_cut(x)
        mixed = F.gelu(self.l(x))
        a = self.a(nchw(self.conv, mixed))
        parts = []
        if short_cut is not None:
            head = channels // self.heads // 2
            kv = self.kv(mixed).reshape(batch, -1, 2, self.heads, head).permute(2, 0, 3, 1, 4)
            cells = self.short_cut_linear(self.pool(short_cut).permute(0, 2, 3, 1))
            m = cells.reshape(batch, -1, self.heads, head).permute(0, 2, 1, 3)
            k, v = kv[0], kv[1]
            found = ((m * head**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
            found = found.reshape(batch, self.heads, self.window, self.window, head)
            found = found.permute(0, 1, 4, 2, 3).reshape(batch, -1, self.window, self.window)
            found = F.interpolate(found, (height, width), mode="bilinear", align_corners=False)
            parts = [found.permute(0, 2, 3, 1)]
        e = self.e_back(nchw(self.e_conv, self.e_fore(e)))
        x = torch.cat([q * a, *parts, cut * e], dim=3)
        return self.proj(x), e if self.last else self.proj_e(x)


class Block(nn.Module):
    """v1's."""

    def __init__(
        self, width: int, heads: int, ratio: int, rate: float, *, window: int, last: bool
    ) -> None:
        super().__init__()
        half, self.last = width // 2, last
        self.attn = Attention(width, heads, window=window, last=last)
        self.mlp = Mlp(width, ratio)
        self.layer_scale_1 = nn.Parameter(torch.full((width,), 1e-6))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), 1e-6))
        if not last:
            self.mlp_e2 = Mlp(half, ratio)
            self.layer_scale_1_e = nn.Parameter(torch.full((half,), 1e-6))
            self.layer_scale_2_e = nn.Parameter(torch.full((half,), 1e-6))
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Colour, depth."""
        of_x, of_e = self.attn(x, e)
        x = x + self.drop_path(self.layer_scale_1 * of_x)
        x = x + self.drop_path(self.layer_scale_2 * self.mlp(x))
        if not self.last:
            e = e + self.drop_path(self.layer_scale_1_e * of_e)
            e = e + self.drop_path(self.layer_scale_2_e * self.mlp_e2(e))
        return x, e


def strided(inputs: int, outputs: int) -> nn.Conv2d:
    """Half the size."""
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)


def _downsampling(channels: int, widths: Sequence[int]) -> nn.ModuleList:
    first = widths[0]
    stem = nn.Sequential(
        strided(channels, first // 2),
        nn.BatchNorm2d(first // 2),
        nn.GELU(),
        strided(first // 2, first),
        nn.BatchNorm2d(first),
    )
    later = [nn.Sequential(nn.BatchNorm2d(a), strided(a, b)) for a, b in itertools.pairwise(widths)]
    return nn.ModuleList([stem, *later])


class DFormer(nn.Module):
    """v1's trunk."""

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratios: Sequence[int],
        windows: Sequence[int],
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.downsample_layers = _downsampling(3, widths)
        self.downsample_layers_e = _downsampling(1, [width // 2 for width in widths])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for stage, (width, depth, head, ratio, window) in enumerate(
            zip(widths, depths, heads, mlp_ratios, windows, strict=True)
        ):
            ends = [stage == 3 and index == depth - 1 for index in range(depth)]
            blocks = [Block(width, head, ratio, next(rates), window=window, last=e) for e in ends]
            self.stages.append(nn.ModuleList(blocks))

    def forward(self, rgb: Tensor, depth: Tensor) -> list[Tensor]:
        """Four maps."""
        x, e, outs = rgb, depth[:, :1], []
        layers: Any = zip(
            self.downsample_layers, self.downsample_layers_e, self.stages, strict=True
        )
        for down, down_e, blocks in layers:
            x, e = down(x).permute(0, 2, 3, 1), down_e(e).permute(0, 2, 3, 1)
            for block in blocks:
                x, e = block(x, e)
            x, e = x.permute(0, 3, 1, 2), e.permute(0, 3, 1, 2)
            outs.append(x)
        return outs
