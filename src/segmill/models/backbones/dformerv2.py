"""DFormerv2: one stream; depth only says how far two pixels are from each other.

Paper:   Yin et al., "DFormerv2: Geometry Self-Attention for RGBD Semantic Segmentation", CVPR 2025,
         https://arxiv.org/abs/2504.04701
Follows: the official code. BatchNorm moves its statistics in training, as SyncBatchNorm does there.
         Its training never updates `Geo.weight` and the layer scales: `NEVER_UPDATED`.
Weights: the official files, pretrained and trained: checkpoint/dformer_keys.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.dformer_keys import KEYS_FROM_DFORMER
from segmill.checkpoint.keys import Rule
from segmill.models.backbones.rgbd import (
    Depthwise,
    as_map,
    as_tokens,
    colour_and_depth,
    projected,
)
from segmill.models.layers import DropPath
from segmill.ops.geometry_attention import attention_along_lines

# In no parameter group of the official training: no layer's weights, but parameters by themselves.
NEVER_UPDATED = (r".+\.Geo\.weight", r".+\.gamma_[12]")
EPS = 1e-6  # of the blocks' LayerNorms; those of the outputs have torch's 1e-5
BASE = 10000.0  # of the rotary frequencies
NEAREST = 2.0  # bits: the first head's scores fall by log(1 - 2^-2) per pixel


class DFormerV2(nn.Module):
    """Four maps at strides 4, 8, 16, 32 of (B, 4, H, W), RGB and depth; all but the first normed.

    The last stage attends to the whole map, the others to rows and then columns. `head_ranges`
    spreads the heads of a stage from near to far; `layer_scale` is what the scales of a stage
    start at (None: it has none).
    """

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
        self.channels = tuple(widths)
        self.strides = tuple(4 * 2**stage for stage in range(len(widths)))
        self.patch_embed = PatchEmbed(widths[0])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        sizes = zip(widths, depths, heads, head_ranges, mlp_ratios, layer_scale, strict=True)
        for stage, (width, depth, head_count, head_range, ratio, scale) in enumerate(sizes):
            last = stage == len(widths) - 1
            blocks = [
                Block(
                    attention=WholeAttention if last else RowColumnAttention,
                    width=width,
                    heads=head_count,
                    head_range=head_range,
                    hidden=int(ratio * width),
                    layer_scale=scale,
                    rate=next(rates),
                )
                for _ in range(depth)
            ]
            next_width = None if last else widths[stage + 1]
            self.layers.append(Stage(blocks, next_width=next_width))
        self.extra_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        self.apply(_initialise)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        colour, depth = colour_and_depth(image)
        feature, features = self.patch_embed(colour), []
        norms = (nn.Identity(), *self.extra_norms)
        for stage, norm in zip(self.layers, norms, strict=True):
            tokens = stage(as_tokens(feature), depth)
            features.append(as_map(norm(tokens)))
            if stage.downsample is not None:
                feature = stage.downsample(as_map(tokens))  # type: ignore[operator]  # a module
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from the official files."""
        return {"dformer": KEYS_FROM_DFORMER}


@dataclass(frozen=True)
class Geometry:
    """What all blocks of a stage share: depth at its size, and the rotation of each token.

    Channels turn in pairs (0 and 1, 2 and 3, ...). `rows` and `columns` count from 0.
    """

    depth: Float[Tensor, "B h w"]
    sine: Float[Tensor, "h w pairs"]
    cosine: Float[Tensor, "h w pairs"]
    rows: Float[Tensor, "h 1"]
    columns: Float[Tensor, "w 1"]


class Stage(nn.Module):
    """Blocks at one size. `downsample` is between this stage and the next."""

    def __init__(self, blocks: Sequence["Block"], *, next_width: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        width = blocks[0].width
        self.downsample = None if next_width is None else PatchMerging(width, next_width)

    def forward(
        self, tokens: Float[Tensor, "B h w D"], depth: Float[Tensor, "B 1 H W"]
    ) -> Float[Tensor, "B h w D"]:
        geometry = self.geometry(depth, *tokens.shape[1:3])
        for block in self.blocks:
            tokens = block(tokens, geometry)
        return tokens

    def geometry(self, depth: Float[Tensor, "B 1 H W"], height: int, width: int) -> Geometry:
        """Tokens are counted row by row, and turn by their number times `angle`, in radians."""
        resized = F.interpolate(depth, (height, width), mode="bilinear", align_corners=False)
        angle: Tensor = self.blocks[0].Geo.angle  # type: ignore[assignment]  # the same in all
        number = torch.arange(height * width, device=angle.device, dtype=angle.dtype)
        # The two of a pair have the same angle.
        turn = (number[:, None] * angle[::2]).view(height, width, -1)
        return Geometry(
            depth=resized[:, 0],
            sine=turn.sin(),
            cosine=turn.cos(),
            rows=_numbers(height, resized),
            columns=_numbers(width, resized),
        )


class Block(nn.Module):
    """A depthwise convolution, geometry attention and a perceptron, all residual."""

    def __init__(
        self,
        *,
        attention: type["WholeAttention"] | type["RowColumnAttention"],
        width: int,
        heads: int,
        head_range: float,
        hidden: int,
        layer_scale: float | None,
        rate: float,
    ) -> None:
        super().__init__()
        self.width = width
        self.cnn_pos_encode = Surroundings(width, kernel=3)
        self.Geo = GeometryPrior(heads=heads, head_range=head_range, key_width=width // heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=EPS)
        self.Attention = attention(width=width, heads=heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=EPS)
        self.ffn = Perceptron(width, hidden)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, 1, 1, width), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((1, 1, 1, width), layer_scale))
        self.drop_path = DropPath(rate)

    def forward(
        self, tokens: Float[Tensor, "B h w D"], geometry: Geometry
    ) -> Float[Tensor, "B h w D"]:
        tokens = self.cnn_pos_encode(tokens, added=tokens)
        attended = self.Attention(self.layer_norm1(tokens), geometry, self.Geo)
        tokens = tokens + self.drop_path(_scaled(attended, self.gamma_1))
        hidden = self.ffn(self.layer_norm2(tokens))
        return tokens + self.drop_path(_scaled(hidden, self.gamma_2))


class GeometryPrior(nn.Module):
    """How fast the scores of each head fall: by `decay` times two distances weighed by `weight`.

    The first weight is for the distance in the map, the second for that in depth. `angle`, in
    radians, is how far a key turns from token to token.
    """

    angle: Float[Tensor, " c"]
    decay: Float[Tensor, " n"]

    def __init__(self, *, heads: int, head_range: float, key_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 1, 1))
        frequencies = 1.0 / BASE ** torch.linspace(0, 1, key_width // 2)
        bits = NEAREST + head_range * torch.arange(heads) / heads
        self.register_buffer("angle", frequencies.repeat_interleave(2))
        self.register_buffer("decay", torch.log(1 - 2.0**-bits))


class WholeAttention(nn.Module):
    """Every token attends to all. `lepe` adds what surrounds each value."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.lepe = Surroundings(width, kernel=5)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "B h w D"], geometry: Geometry, prior: GeometryPrior
    ) -> Float[Tensor, "B h w D"]:
        query, key, value = projected(tokens, self.q_proj, self.k_proj, self.v_proj)
        split = (self.heads, -1)
        found = self.attended(
            query.unflatten(-1, split),
            key.unflatten(-1, split),
            value.unflatten(-1, split),
            geometry,
            prior,
        )
        return self.out_proj(self.lepe(value, added=found.flatten(-2)))

    def attended(
        self,
        query: Float[Tensor, "B h w n c"],
        key: Float[Tensor, "B h w n c"],
        value: Float[Tensor, "B h w n c"],
        geometry: Geometry,
        prior: GeometryPrior,
    ) -> Float[Tensor, "B h w n c"]:
        """What each token finds in the whole map."""
        query, key, value = (each.flatten(1, 2).unsqueeze(1) for each in (query, key, value))
        found = attention_along_lines(
            query,
            key,
            value,
            geometry.depth.flatten(1).unsqueeze(1),
            prior.weight.flatten(),
            prior.decay,
            position=torch.cartesian_prod(geometry.rows[:, 0], geometry.columns[:, 0]),
            across=None,
            sine=geometry.sine.flatten(0, 1).unsqueeze(0),
            cosine=geometry.cosine.flatten(0, 1).unsqueeze(0),
        )
        return found.squeeze(1).unflatten(1, geometry.depth.shape[1:])


class RowColumnAttention(WholeAttention):
    """Every token attends to its row; then to its column, whose values know their rows by then."""

    def attended(
        self,
        query: Float[Tensor, "B h w n c"],
        key: Float[Tensor, "B h w n c"],
        value: Float[Tensor, "B h w n c"],
        geometry: Geometry,
        prior: GeometryPrior,
    ) -> Float[Tensor, "B h w n c"]:
        """What each token finds, by way of its row, in the whole map."""
        return attention_along_lines(
            query,
            key,
            value,
            geometry.depth,
            prior.weight.flatten(),
            prior.decay,
            position=geometry.columns,
            across=geometry.rows,
            sine=geometry.sine,
            cosine=geometry.cosine,
        )


class Perceptron(nn.Module):
    """Two layers, between them a depthwise 3 x 3 beside its own input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = Surroundings(hidden, kernel=3)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        hidden = F.gelu(self.fc1(tokens))
        return self.fc2(self.dwconv(hidden, added=hidden))


class Surroundings(nn.Module):
    """A depthwise convolution, under the official name for the one in its module."""

    def __init__(self, width: int, *, kernel: int) -> None:
        super().__init__()
        self.dwconv = Depthwise(width, kernel=kernel)

    def forward(
        self, tokens: Float[Tensor, "B h w D"], *, added: Float[Tensor, "B h w D"]
    ) -> Float[Tensor, "B h w D"]:
        return self.dwconv(tokens, added=added)


class PatchEmbed(nn.Module):
    """The stem: four convolutions, to stride 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        sizes = ((3, half, 2), (half, half, 1), (half, width, 2), (width, width, 1))
        layers = [
            layer
            for inputs, outputs, stride in sizes
            for layer in (
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                nn.BatchNorm2d(outputs),
                nn.GELU(),
            )
        ]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.proj(image)


class PatchMerging(nn.Module):
    """Half the size: a strided convolution, then BatchNorm."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, feature: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.norm(self.reduction(feature))


def _numbers(count: int, like: Tensor) -> Float[Tensor, "count 1"]:
    return torch.arange(count, device=like.device, dtype=like.dtype)[:, None]


def _scaled(
    branch: Float[Tensor, "B h w D"], factor: Float[Tensor, "1 1 1 D"] | None
) -> Float[Tensor, "B h w D"]:
    return branch if factor is None else factor * branch


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
