"""DFormerv2's trunk as `_dformer_peers` has v1's: the published algorithm, nothing rearranged."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks._dformer_peers import DropPath, nchw, strided
from torch import Tensor, nn


class DWConv(nn.Module):
    """v2's wrapper."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        return nchw(self.dwconv, x)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Interleaved pairs."""
    other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + other * sin


class GeoPriorGen(nn.Module):
    """Rotation and full masks, made anew in every block."""

    angle: Tensor
    decay: Tensor

    def __init__(self, key_dim: int, heads: int, heads_range: float) -> None:
        super().__init__()
        angle = 1.0 / 10000 ** torch.linspace(0, 1, key_dim // 2)
        self.weight = nn.Parameter(torch.ones(2, 1, 1, 1))
        exponent = -2 - heads_range * torch.arange(heads, dtype=torch.float) / heads
        self.register_buffer("angle", angle.unsqueeze(-1).repeat(1, 2).flatten())
        self.register_buffer("decay", torch.log(1 - 2**exponent))

    def forward(self, size: tuple[int, int], depth: Tensor, *, split: bool) -> Any:
        """((sin, cos), mask or masks)."""
        height, width = size
        depth = F.interpolate(depth, size, mode="bilinear", align_corners=False)
        index = torch.arange(height * width).to(self.decay)
        sin = torch.sin(index[:, None] * self.angle[None]).reshape(height, width, -1)
        cos = torch.cos(index[:, None] * self.angle[None]).reshape(height, width, -1)
        first, second = self.weight[0], self.weight[1]
        decay = self.decay[None, :, None, None]
        if not split:
            rows, columns = torch.arange(height).to(depth), torch.arange(width).to(depth)
            grid = torch.stack(torch.meshgrid([rows, columns], indexing="ij"), dim=-1).flatten(0, 1)
            near = (grid[:, None] - grid[None]).abs().sum(dim=-1)
            z = depth.reshape(depth.shape[0], -1)
            deep = (z[:, :, None] - z[:, None]).abs()[:, None]
            mask = first * (near[None, None] * decay) + second * (deep * decay)
            return (sin, cos), mask
        return (sin, cos), (
            self._along(depth.squeeze(1).transpose(1, 2), decay, first, second),
            self._along(depth.squeeze(1), decay, first, second),
        )

    def _along(self, depth: Tensor, decay: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(B, heads, lines, L, L) of depth (B, lines, L)."""
        index = torch.arange(depth.shape[2]).to(depth)
        near = (index[:, None] - index[None]).abs()
        deep = (depth[:, :, :, None] - depth[:, :, None]).abs()
        near_mask = first * (near[None, None] * decay)
        deep_mask = second * (deep[:, None] * decay[..., None])
        return near_mask.unsqueeze(2) + deep_mask


class GeoAttention(nn.Module):
    """v2's, whole or split."""

    def __init__(self, width: int, heads: int, *, split: bool) -> None:
        super().__init__()
        self.heads, self.split, self.head = heads, split, width // heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.lepe = DWConv(width, 5)

    def forward(self, x: Tensor, prior: Any) -> Tensor:
        """Explicit matrices of probabilities."""
        batch, height, width, channels = x.shape
        (sin, cos), mask = prior
        q, k, v = self.q_proj(x), self.k_proj(x) * self.head**-0.5, self.v_proj(x)
        lepe = self.lepe(v)
        shape = (batch, height, width, self.heads, self.head)
        q = rotate(q.view(shape).permute(0, 3, 1, 2, 4), sin, cos)
        k = rotate(k.view(shape).permute(0, 3, 1, 2, 4), sin, cos)
        if self.split:
            mask_h, mask_w = mask
            v = v.reshape(shape).permute(0, 1, 3, 2, 4)  # (B, h, n, w, c)
            scores = q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)
            v = torch.softmax(scores + mask_w.transpose(1, 2), -1) @ v
            v = v.permute(0, 3, 2, 1, 4)  # (B, w, n, h, c)
            scores = q.permute(0, 3, 1, 2, 4) @ k.permute(0, 3, 1, 4, 2)
            found = torch.softmax(scores + mask_h.transpose(1, 2), -1) @ v
            found = found.permute(0, 3, 1, 2, 4)
        else:
            v = v.reshape(shape).permute(0, 3, 1, 2, 4).flatten(2, 3)
            scores = q.flatten(2, 3) @ k.flatten(2, 3).transpose(-1, -2)
            found = torch.softmax(scores + mask, -1) @ v
            found = found.transpose(1, 2)
        return self.out_proj(found.reshape(batch, height, width, channels) + lepe)


class FeedForward(nn.Module):
    """v2's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dwconv = DWConv(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        """GELU before the convolution."""
        x = F.gelu(self.fc1(x))
        residual = x
        return self.fc2(self.dwconv(x) + residual)


class GeoBlock(nn.Module):
    """v2's."""

    def __init__(
        self, width: int, heads: int, heads_range: float, hidden: int, scale: float | None,
        rate: float, *, split: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.split, self.scaled = split, scale is not None
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.Attention = GeoAttention(width, heads, split=split)
        self.Geo = GeoPriorGen(width // heads, heads, heads_range)
        self.ffn = FeedForward(width, hidden)
        self.cnn_pos_encode = DWConv(width, 3)
        self.drop_path = DropPath(rate)
        if scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, 1, 1, width), scale))
            self.gamma_2 = nn.Parameter(torch.full((1, 1, 1, width), scale))

    def forward(self, x: Tensor, depth: Tensor) -> Tensor:
        """`depth` at the size of the image."""
        x = x + self.cnn_pos_encode(x)
        prior = self.Geo((x.shape[1], x.shape[2]), depth, split=self.split)
        if self.scaled:
            x = x + self.drop_path(self.gamma_1 * self.Attention(self.layer_norm1(x), prior))
            return x + self.drop_path(self.gamma_2 * self.ffn(self.layer_norm2(x)))
        x = x + self.drop_path(self.Attention(self.layer_norm1(x), prior))
        return x + self.drop_path(self.ffn(self.layer_norm2(x)))


class PatchMerging(nn.Module):
    """Convolution, then norm."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.reduction = strided(width, out)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2).contiguous())).permute(0, 2, 3, 1)


class Layer(nn.Module):
    """A stage of v2."""

    def __init__(self, blocks: list[GeoBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class PatchEmbed(nn.Module):
    """v2's stem."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        convs = ((3, half, 2), (half, half, 1), (half, width, 2), (width, width, 1))
        layers: list[nn.Module] = []
        for a, b, stride in convs:
            conv = nn.Conv2d(a, b, 3, stride=stride, padding=1)
            layers += [conv, nn.BatchNorm2d(b), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map to tokens."""
        return self.proj(x).permute(0, 2, 3, 1)


class DFormerV2(nn.Module):
    """v2's trunk."""

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        head_ranges: Sequence[float],
        mlp_ratios: Sequence[float],
        layer_scale: Sequence[float | None],
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(widths[0])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for i, width in enumerate(widths):
            blocks = [
                GeoBlock(
                    width, heads[i], head_ranges[i], int(mlp_ratios[i] * width), layer_scale[i],
                    next(rates), split=i < 3,
                )
                for _ in range(depths[i])
            ]  # fmt: skip
            down = PatchMerging(width, widths[i + 1]) if i < 3 else None
            self.layers.append(Layer(blocks, down))
        self.extra_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])

    def forward(self, rgb: Tensor, depth: Tensor) -> list[Tensor]:
        """Four maps."""
        x, depth, outs = self.patch_embed(rgb), depth[:, :1], []
        for i, layer in enumerate(self.layers):
            stage: Any = layer
            for block in stage.blocks:
                x = block(x, depth)
            out = self.extra_norms[i - 1](x) if i else x
            outs.append(out.permute(0, 3, 1, 2).contiguous())
            x = x if stage.downsample is None else stage.downsample(x)
        return outs
