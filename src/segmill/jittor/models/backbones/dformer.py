"""DFormer: two streams, colour and depth at half the width, that meet in every block.

Paper:   Yin et al., "DFormer: Rethinking RGBD Representation Learning for Semantic Segmentation",
         ICLR 2024, https://arxiv.org/abs/2309.09668
Follows: `segmill.models.backbones.dformer`, by name and by number.
Weights: the official files, pretrained and trained: checkpoint/dformer_keys.py.
"""

from collections.abc import Sequence
from itertools import pairwise

import jittor as jt
import numpy as np
from jaxtyping import Float
from jittor import nn

from segmill.checkpoint.dformer_keys import KEYS_FROM_DFORMER
from segmill.checkpoint.keys import Rule
from segmill.errors import SegmillError
from segmill.jittor.models.backbones.rgbd import Depthwise, as_map, as_tokens, colour_and_depth
from segmill.jittor.models.layers import (
    GELU,
    BatchNorm2d,
    Conv2d,
    DropPath,
    LayerNorm,
    Linear,
    adaptive_average_pool,
    filled,
    resize,
)

# The official parameter groups know torch's norms only, and these are of another class there.
NEVER_UPDATED = (
    r"backbone\.stages\..+\.(norm|norm_e)\.(weight|bias)",
    r".+\.layer_scale_[12](_e)?",
)
GRID = 7  # cells of the pooled attention in both directions
LAYER_SCALE = 1e-6
EPS = 1e-6  # of the LayerNorms
EPS_BATCH = 1e-5


class DFormer(jt.Module):
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
        if not set(windows) <= {0, GRID}:
            raise SegmillError(
                f"DFormer's windows are {list(windows)}. Each is 0 (no pooled attention) or {GRID}."
            )
        self.channels = tuple(widths)
        self.strides = tuple(4 * 2**stage for stage in range(len(widths)))
        self.downsample_layers = _downsampling(3, widths)
        self.downsample_layers_e = _downsampling(1, [width // 2 for width in widths])
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
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

    def execute(self, image: Float[jt.Var, "B C H W"]) -> list[Float[jt.Var, "B _D _h _w"]]:
        colour, depth = colour_and_depth(image)
        features = []
        steps = zip(self.downsample_layers, self.downsample_layers_e, self.stages, strict=True)
        for down, down_depth, blocks in steps:
            tokens, depth_tokens = as_tokens(down(colour)), as_tokens(down_depth(depth))
            for block in blocks:
                tokens, depth_tokens = block(tokens, depth_tokens)
            colour, depth = as_map(tokens), as_map(depth_tokens)
            features.append(colour)
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from the official files."""
        return {"dformer": KEYS_FROM_DFORMER}


class Block(jt.Module):
    """Attention, then a perceptron for each stream; all residual and scaled per channel.

    A block that `ends_depth` leaves the depth as it came: nothing uses it any more.
    """

    def __init__(
        self, *, width: int, heads: int, mlp_ratio: int, pooled: bool, ends_depth: bool, rate: float
    ) -> None:
        half = width // 2
        kind = PooledAttention if pooled else Attention
        self.attn = kind(width=width, heads=heads, ends_depth=ends_depth)
        self.mlp = Perceptron(width, mlp_ratio * width)
        self.layer_scale_1, self.layer_scale_2 = (
            filled(width, LAYER_SCALE),
            filled(width, LAYER_SCALE),
        )
        self.mlp_e2: Perceptron | None = None
        if not ends_depth:
            self.mlp_e2 = Perceptron(half, mlp_ratio * half)
            self.layer_scale_1_e, self.layer_scale_2_e = (
                filled(half, LAYER_SCALE),
                filled(half, LAYER_SCALE),
            )
        self.drop_path = DropPath(rate)

    def execute(
        self, colour: Float[jt.Var, "B h w D"], depth: Float[jt.Var, "B h w E"]
    ) -> tuple[Float[jt.Var, "B h w D"], Float[jt.Var, "B h w E"]]:
        attended, attended_depth = self.attn(colour, depth)
        colour = colour + self.drop_path(self.layer_scale_1 * attended)
        colour = colour + self.drop_path(self.layer_scale_2 * self.mlp(colour))
        if self.mlp_e2 is not None:
            depth = depth + self.drop_path(self.layer_scale_1_e * attended_depth)
            depth = depth + self.drop_path(self.layer_scale_2_e * self.mlp_e2(depth))
        return colour, depth


class Attention(jt.Module):
    """Colour weighs itself by its surroundings, and by those of the depth.

    The second result is for the depth, and None where that ends.
    """

    parts_of_width = 1.5  # what `proj` merges, in widths

    def __init__(self, *, width: int, heads: int, ends_depth: bool) -> None:
        half, merged = width // 2, int(self.parts_of_width * width)
        self.heads = heads
        self.norm = LayerNorm(width, eps=EPS)
        self.norm_e = LayerNorm(half, eps=EPS)
        self.q = Linear(width, width)
        self.q_cut = Linear(width, half)
        self.l = Linear(width, width)
        self.conv = Depthwise(width, kernel=7)
        self.a = Linear(width, width)
        self.e_fore = Linear(half, half)
        self.e_conv = Depthwise(half, kernel=7)
        self.e_back = Linear(half, half)
        self.proj = Linear(merged, width)
        self.proj_e = None if ends_depth else Linear(merged, half)

    def execute(
        self, colour: Float[jt.Var, "B h w D"], depth: Float[jt.Var, "B h w E"]
    ) -> tuple[Float[jt.Var, "B h w D"], Float[jt.Var, "B h w E"] | None]:
        colour, depth = self.norm(colour), self.norm_e(depth)
        mixed = nn.gelu(self.l(colour))
        merged = jt.concat(self.parts(colour, depth, mixed), dim=-1)
        return self.proj(merged), None if self.proj_e is None else self.proj_e(merged)

    def parts(
        self,
        colour: Float[jt.Var, "B h w D"],
        depth: Float[jt.Var, "B h w E"],
        mixed: Float[jt.Var, "B h w D"],
    ) -> list[Float[jt.Var, "B h w _D"]]:
        """What is merged, side by side."""
        by_colour = self.q(colour) * self.a(self.conv(mixed))
        by_depth = self.q_cut(colour) * self.e_back(self.e_conv(self.e_fore(depth)))
        return [by_colour, by_depth]


class PooledAttention(Attention):
    """In addition, each of 7 x 7 cells of both streams attends to all pixels."""

    parts_of_width = 2.0

    def __init__(self, *, width: int, heads: int, ends_depth: bool) -> None:
        super().__init__(width=width, heads=heads, ends_depth=ends_depth)
        self.short_cut_linear = Linear(width + width // 2, width // 2)
        self.kv = Linear(width, width)

    def parts(
        self,
        colour: Float[jt.Var, "B h w D"],
        depth: Float[jt.Var, "B h w E"],
        mixed: Float[jt.Var, "B h w D"],
    ) -> list[Float[jt.Var, "B h w _D"]]:
        by_colour, by_depth = super().parts(colour, depth, mixed)
        return [by_colour, self.of_cells(colour, depth, mixed), by_depth]

    def of_cells(
        self,
        colour: Float[jt.Var, "B h w D"],
        depth: Float[jt.Var, "B h w E"],
        mixed: Float[jt.Var, "B h w D"],
    ) -> Float[jt.Var, "B h w E"]:
        """What the cells found, interpolated to all pixels."""
        batch, height, width, channels = colour.shape
        per_head = channels // 2 // self.heads
        both = as_map(jt.concat([colour, depth], dim=-1))
        cells = as_tokens(adaptive_average_pool(both, GRID)).reshape(batch, GRID * GRID, -1)
        query = self.short_cut_linear(cells).reshape(batch, GRID * GRID, self.heads, per_head)
        pixels = self.kv(mixed).reshape(batch, height * width, 2, self.heads, per_head)
        key, value = pixels[:, :, 0].transpose(0, 2, 3, 1), pixels[:, :, 1].transpose(0, 2, 1, 3)
        similarity = jt.matmul(query.transpose(0, 2, 1, 3) * per_head**-0.5, key)
        found = jt.matmul(nn.softmax(similarity, dim=-1), value)  # (B, heads, cells, per head)
        grid = found.transpose(0, 1, 3, 2).reshape(batch, channels // 2, GRID, GRID)
        return as_tokens(resize(grid, (height, width)))


class Perceptron(jt.Module):
    """LayerNorm and two layers, between them a depthwise 3 x 3 beside its own input."""

    def __init__(self, width: int, hidden: int) -> None:
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = Linear(width, hidden)
        self.pos = Depthwise(hidden, kernel=3)
        self.fc2 = Linear(hidden, width)

    def execute(self, tokens: Float[jt.Var, "B h w D"]) -> Float[jt.Var, "B h w D"]:
        hidden = self.fc1(self.norm(tokens))
        return self.fc2(nn.gelu(self.pos(hidden) + hidden))


def _downsampling(in_channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """The stem, to stride 4, and before each later stage BatchNorm and a strided convolution."""
    first = widths[0]
    stem = nn.Sequential(
        Conv2d(in_channels, first // 2, 3, stride=2),
        BatchNorm2d(first // 2, eps=EPS_BATCH),
        GELU(),
        Conv2d(first // 2, first, 3, stride=2),
        BatchNorm2d(first, eps=EPS_BATCH),
    )
    between = (
        nn.Sequential(BatchNorm2d(a, eps=EPS_BATCH), Conv2d(a, b, 3, stride=2))
        for a, b in pairwise(widths)
    )
    return nn.ModuleList([stem, *between])
