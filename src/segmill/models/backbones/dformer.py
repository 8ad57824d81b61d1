"""DFormer: two streams, colour and depth at half the width, that meet in every block.

Paper:   Yin et al., "DFormer: Rethinking RGBD Representation Learning for Semantic Segmentation",
         ICLR 2024, https://arxiv.org/abs/2309.09668
Follows: the official code. Its training never updates `norm` and `norm_e` of the attention, `norm`
         of the perceptrons, and the layer scales: `NEVER_UPDATED`.
Weights: the official files, pretrained and trained: checkpoint/dformer_keys.py.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.dformer_keys import KEYS_FROM_DFORMER
from segmill.checkpoint.keys import Rule
from segmill.errors import SegmillError
from segmill.models.backbones.rgbd import (
    Depthwise,
    as_map,
    as_tokens,
    colour_and_depth,
    projected,
)
from segmill.models.layers import DropPath
from segmill.ops.cell_means import cell_means

# The official parameter groups know torch's norms only, and these are of another class there.
NEVER_UPDATED = (
    r"backbone\.stages\..+\.(norm|norm_e)\.(weight|bias)",
    r".+\.layer_scale_[12](_e)?",
)
GRID = 7  # cells of the pooled attention in both directions
LAYER_SCALE = 1e-6
EPS = 1e-6  # of the LayerNorms


class DFormer(nn.Module):
    """Four colour maps at strides 4, 8, 16, 32, not normalised, of (B, 4, H, W): RGB and depth.

    `windows` is 7 for stages with pooled attention and 0 for those without. `mlp_ratios` hold for
    both streams, `heads` for the pooled attention.
    """

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
        if not set(windows) <= {0, GRID}:
            raise SegmillError(
                f"DFormer's windows are {list(windows)}. Each is 0 (no pooled attention) or {GRID}."
            )
        self.channels = tuple(widths)
        self.strides = tuple(4 * 2**stage for stage in range(len(widths)))
        halves = [width // 2 for width in widths]
        self.downsample_layers = _downsampling(3, widths)
        self.downsample_layers_e = _downsampling(1, halves)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        sizes = zip(widths, depths, heads, mlp_ratios, windows, strict=True)
        for stage, (width, depth, head_count, ratio, window) in enumerate(sizes, start=1):
            ends = [stage == len(widths) and block == depth - 1 for block in range(depth)]
            blocks = [
                Block(
                    width=width,
                    heads=head_count,
                    mlp_ratio=ratio,
                    pooled=window > 0,
                    ends_depth=end,
                    rate=next(rates),
                )
                for end in ends
            ]
            self.stages.append(nn.ModuleList(blocks))

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        colour, depth = colour_and_depth(image)
        features = []
        steps = zip(self.downsample_layers, self.downsample_layers_e, self.stages, strict=True)
        for down, down_depth, blocks in steps:
            tokens, depth_tokens = as_tokens(down(colour)), as_tokens(down_depth(depth))
            for block in blocks:  # type: ignore[union-attr]  # a ModuleList
                tokens, depth_tokens = block(tokens, depth_tokens)
            colour, depth = as_map(tokens), as_map(depth_tokens)
            features.append(colour)
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from the official files."""
        return {"dformer": KEYS_FROM_DFORMER}


class Block(nn.Module):
    """Attention, then a perceptron for each stream; all residual and scaled per channel.

    A block that `ends_depth` leaves the depth as it came: nothing uses it any more.
    """

    def __init__(
        self, *, width: int, heads: int, mlp_ratio: int, pooled: bool, ends_depth: bool, rate: float
    ) -> None:
        super().__init__()
        half = width // 2
        kind = PooledAttention if pooled else Attention
        self.attn = kind(width=width, heads=heads, ends_depth=ends_depth)
        self.mlp = Perceptron(width, mlp_ratio * width)
        self.layer_scale_1, self.layer_scale_2 = _scale(width), _scale(width)
        self.mlp_e2: Perceptron | None = None
        if not ends_depth:
            self.mlp_e2 = Perceptron(half, mlp_ratio * half)
            self.layer_scale_1_e, self.layer_scale_2_e = _scale(half), _scale(half)
        self.drop_path = DropPath(rate)

    def forward(
        self, colour: Float[Tensor, "B h w D"], depth: Float[Tensor, "B h w E"]
    ) -> tuple[Float[Tensor, "B h w D"], Float[Tensor, "B h w E"]]:
        attended, attended_depth = self.attn(colour, depth)
        colour = colour + self.drop_path(self.layer_scale_1 * attended)
        colour = colour + self.drop_path(self.layer_scale_2 * self.mlp(colour))
        if self.mlp_e2 is not None:
            depth = depth + self.drop_path(self.layer_scale_1_e * attended_depth)
            depth = depth + self.drop_path(self.layer_scale_2_e * self.mlp_e2(depth))
        return colour, depth


class Attention(nn.Module):
    """Colour weighs itself by its surroundings, and by those of the depth.

    The second result is for the depth, and None where that ends.
    """

    parts_of_width = 1.5  # what `proj` merges, in widths

    def __init__(self, *, width: int, heads: int, ends_depth: bool) -> None:
        super().__init__()
        half, merged = width // 2, int(self.parts_of_width * width)
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.norm_e = nn.LayerNorm(half, eps=EPS)
        self.q = nn.Linear(width, width)
        self.q_cut = nn.Linear(width, half)
        self.l = nn.Linear(width, width)
        self.conv = Depthwise(width, kernel=7)
        self.a = nn.Linear(width, width)
        self.e_fore = nn.Linear(half, half)
        self.e_conv = Depthwise(half, kernel=7)
        self.e_back = nn.Linear(half, half)
        self.proj = nn.Linear(merged, width)
        self.proj_e = None if ends_depth else nn.Linear(merged, half)

    def forward(
        self, colour: Float[Tensor, "B h w D"], depth: Float[Tensor, "B h w E"]
    ) -> tuple[Float[Tensor, "B h w D"], Float[Tensor, "B h w E"] | None]:
        colour, depth = self.norm(colour), self.norm_e(depth)
        query, query_cut, mixed = projected(colour, self.q, self.q_cut, self.l)
        mixed = F.gelu(mixed)
        by_colour = query * self.a(self.conv(mixed))
        by_depth = query_cut * self.e_back(self.e_conv(self.e_fore(depth)))
        parts = [by_colour, *self.between(colour, depth, mixed), by_depth]
        merged = torch.cat(parts, dim=-1)
        if self.proj_e is None:
            return self.proj(merged), None
        of_colour, of_depth = projected(merged, self.proj, self.proj_e)
        return of_colour, of_depth

    def between(
        self,
        colour: Float[Tensor, "B h w D"],  # noqa: ARG002 - for what overrides this
        depth: Float[Tensor, "B h w E"],  # noqa: ARG002
        mixed: Float[Tensor, "B h w D"],  # noqa: ARG002
    ) -> list[Float[Tensor, "B h w E"]]:
        """What is merged beside both: nothing here."""
        return []


class PooledAttention(Attention):
    """In addition, each of 7 x 7 cells of both streams attends to all pixels."""

    parts_of_width = 2.0

    def __init__(self, *, width: int, heads: int, ends_depth: bool) -> None:
        super().__init__(width=width, heads=heads, ends_depth=ends_depth)
        self.short_cut_linear = nn.Linear(width + width // 2, width // 2)
        self.kv = nn.Linear(width, width)

    def between(
        self,
        colour: Float[Tensor, "B h w D"],
        depth: Float[Tensor, "B h w E"],
        mixed: Float[Tensor, "B h w D"],
    ) -> list[Float[Tensor, "B h w E"]]:
        """What the cells found."""
        return [self.of_cells(colour, depth, mixed)]

    def of_cells(
        self,
        colour: Float[Tensor, "B h w D"],
        depth: Float[Tensor, "B h w E"],
        mixed: Float[Tensor, "B h w D"],
    ) -> Float[Tensor, "B h w E"]:
        """What the cells found, interpolated to all pixels."""
        # Each stream pooled by itself: their full-size maps need not stand side by side.
        cells = torch.cat([cell_means(colour, GRID), cell_means(depth, GRID)], dim=-1)
        query = self.short_cut_linear(cells).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pixels = self.kv(mixed).flatten(1, 2).unflatten(-1, (2, self.heads, -1))
        key, value = pixels.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value)
        grid = found.transpose(1, 2).flatten(2).unflatten(1, (GRID, GRID))
        size = colour.shape[1:3]
        return as_tokens(F.interpolate(as_map(grid), size, mode="bilinear", align_corners=False))


class Perceptron(nn.Module):
    """LayerNorm and two layers, between them a depthwise 3 x 3 beside its own input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.pos = Depthwise(hidden, kernel=3)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        hidden = self.fc1(self.norm(tokens))
        return self.fc2(self.pos(hidden, added=hidden, gelu=True))


def _scale(width: int) -> nn.Parameter:
    return nn.Parameter(torch.full((width,), LAYER_SCALE))


def _downsampling(in_channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """The stem, to stride 4, and before each later stage BatchNorm and a strided convolution."""
    first = widths[0]
    stem = nn.Sequential(
        _strided(in_channels, first // 2),
        nn.BatchNorm2d(first // 2),
        nn.GELU(),
        _strided(first // 2, first),
        nn.BatchNorm2d(first),
    )
    between = itertools.pairwise(widths)
    return nn.ModuleList(
        [stem, *(nn.Sequential(nn.BatchNorm2d(a), _strided(a, b)) for a, b in between)]
    )


def _strided(in_channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
