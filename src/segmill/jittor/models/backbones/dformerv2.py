"""DFormerv2: one stream; depth only says how far two pixels are from each other.

Paper:   Yin et al., "DFormerv2: Geometry Self-Attention for RGBD Semantic Segmentation", CVPR 2025,
         https://arxiv.org/abs/2504.04701
Follows: `segmill.models.backbones.dformerv2`, by name and by number.
Weights: the official files, pretrained and trained: checkpoint/dformer_keys.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jittor as jt
import numpy as np
from jaxtyping import Float
from jittor import nn

from segmill.checkpoint.dformer_keys import KEYS_FROM_DFORMER
from segmill.checkpoint.keys import Rule
from segmill.jittor import random
from segmill.jittor.models.backbones.rgbd import Depthwise, as_map, as_tokens, colour_and_depth
from segmill.jittor.models.layers import (
    GELU,
    BatchNorm2d,
    Conv2d,
    DropPath,
    LayerNorm,
    Linear,
    constant,
    filled,
    resize,
)

EPS = 1e-6  # of the blocks' LayerNorms
EPS_OUTPUTS = 1e-5  # of the LayerNorms of the outputs
EPS_BATCH = 1e-5
BASE = 10000.0  # of the rotary frequencies
NEAREST = 2.0  # bits: the first head's scores fall by log(1 - 2^-2) per pixel
LINEAR_STD = 0.02


class DFormerV2(jt.Module):
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
        self.channels = tuple(widths)
        self.strides = tuple(4 * 2**stage for stage in range(len(widths)))
        self.patch_embed = PatchEmbed(widths[0])
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
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
            self.layers.append(Stage(blocks, width=width, next_width=next_width))
        self.extra_norms = nn.ModuleList(
            [LayerNorm(width, eps=EPS_OUTPUTS) for width in widths[1:]]
        )
        for module in self.modules():
            if isinstance(module, Linear):
                _initialise(module)

    def execute(self, image: Float[jt.Var, "B C H W"]) -> list[Float[jt.Var, "B _D _h _w"]]:
        colour, depth = colour_and_depth(image)
        feature, features = self.patch_embed(colour), []
        norms = (nn.Identity(), *self.extra_norms)
        for stage, norm in zip(self.layers, norms, strict=True):
            tokens = stage(as_tokens(feature), depth)
            features.append(as_map(norm(tokens)))
            if stage.downsample is not None:
                feature = stage.downsample(as_map(tokens))
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from the official files."""
        return {"dformer": KEYS_FROM_DFORMER}


@dataclass(frozen=True)
class Geometry:
    """What all blocks of a stage share: depth at its size, and the rotation of each token."""

    depth: Float[jt.Var, "B h w"]
    sine: Float[jt.Var, "h w 1 c"]
    cosine: Float[jt.Var, "h w 1 c"]


class Stage(jt.Module):
    """Blocks at one size. `downsample` is between this stage and the next."""

    def __init__(self, blocks: Sequence["Block"], *, width: int, next_width: int | None) -> None:
        self.blocks = nn.ModuleList(list(blocks))
        self.downsample = None if next_width is None else PatchMerging(width, next_width)

    def execute(
        self, tokens: Float[jt.Var, "B h w D"], depth: Float[jt.Var, "B 1 H W"]
    ) -> Float[jt.Var, "B h w D"]:
        geometry = geometry_of(depth, tuple(tokens.shape[1:3]), self.blocks[0].Geo.angle)
        for block in self.blocks:
            tokens = block(tokens, geometry)
        return tokens


def geometry_of(
    depth: Float[jt.Var, "B 1 H W"], size: Sequence[int], angle: Float[jt.Var, " c"]
) -> Geometry:
    """Tokens are counted row by row, and turn by their number times `angle`, in radians."""
    height, width = size
    number = constant(np.arange(height * width, dtype=np.float32)).reshape(height, width, 1, 1)
    turn = number * angle
    return Geometry(resize(depth, (height, width))[:, 0], jt.sin(turn), jt.cos(turn))


class Block(jt.Module):
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
        self.cnn_pos_encode = Surroundings(width, kernel=3)
        self.Geo = GeometryPrior(heads=heads, head_range=head_range, key_width=width // heads)
        self.layer_norm1 = LayerNorm(width, eps=EPS)
        self.Attention = attention(width=width, heads=heads)
        self.layer_norm2 = LayerNorm(width, eps=EPS)
        self.ffn = Perceptron(width, hidden)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = filled((1, 1, 1, width), layer_scale)
            self.gamma_2 = filled((1, 1, 1, width), layer_scale)
        self.drop_path = DropPath(rate)

    def execute(
        self, tokens: Float[jt.Var, "B h w D"], geometry: Geometry
    ) -> Float[jt.Var, "B h w D"]:
        tokens = tokens + self.cnn_pos_encode(tokens)
        attended = self.Attention(self.layer_norm1(tokens), geometry, self.Geo)
        tokens = tokens + self.drop_path(_scaled(attended, self.gamma_1))
        hidden = self.ffn(self.layer_norm2(tokens))
        return tokens + self.drop_path(_scaled(hidden, self.gamma_2))


class GeometryPrior(jt.Module):
    """How fast the scores of each head fall: by `decay` times two distances weighed by `weight`.

    The first weight is for the distance in the map, the second for that in depth. `angle`, in
    radians, is how far a key turns from token to token.
    """

    buffers = ("angle", "decay")

    def __init__(self, *, heads: int, head_range: float, key_width: int) -> None:
        self.weight = filled((2, 1, 1, 1), 1.0)
        frequencies = 1.0 / BASE ** np.linspace(0, 1, key_width // 2)
        bits = NEAREST + head_range * np.arange(heads) / heads
        self.angle = constant(np.repeat(frequencies, 2).astype(np.float32))
        self.decay = constant(np.log(1 - 2.0**-bits).astype(np.float32))

    def execute(
        self, depth: Float[jt.Var, "B lines L"], distance: Float[np.ndarray, "L L"]
    ) -> Float[jt.Var, "B n lines L L"]:
        """What is added to the scores of each head, for tokens `distance` apart in the map."""
        apart = (depth.unsqueeze(-1) - depth.unsqueeze(-2)).abs().unsqueeze(1)
        mixed = self.weight[0] * constant(distance) + self.weight[1] * apart
        return self.decay.reshape(1, -1, 1, 1, 1) * mixed


class WholeAttention(jt.Module):
    """Every token attends to all. `lepe` adds what surrounds each value."""

    def __init__(self, *, width: int, heads: int) -> None:
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.lepe = Surroundings(width, kernel=5)
        self.out_proj = Linear(width, width)

    def execute(
        self, tokens: Float[jt.Var, "B h w D"], geometry: Geometry, prior: GeometryPrior
    ) -> Float[jt.Var, "B h w D"]:
        split = (*tokens.shape[:3], self.heads, tokens.shape[3] // self.heads)
        query = rotated(self.q_proj(tokens).reshape(split), geometry)
        key = rotated(self.k_proj(tokens).reshape(split) * split[-1] ** -0.5, geometry)
        value = self.v_proj(tokens)
        found = self.attended(query, key, value.reshape(split), geometry.depth, prior)
        return self.out_proj(found.reshape(tokens.shape) + self.lepe(value))

    def attended(
        self,
        query: Float[jt.Var, "B h w n c"],
        key: Float[jt.Var, "B h w n c"],
        value: Float[jt.Var, "B h w n c"],
        depth: Float[jt.Var, "B h w"],
        prior: GeometryPrior,
    ) -> Float[jt.Var, "B h w n c"]:
        """What each token finds in the whole map."""
        batch, height, width, heads, per_head = query.shape
        line = (batch, 1, height * width, heads, per_head)
        rows, columns = np.divmod(np.arange(height * width), width)
        bias = prior(depth.reshape(line[:3]), _apart(rows) + _apart(columns))
        found = _along_lines(query.reshape(line), key.reshape(line), value.reshape(line), bias)
        return found.reshape(query.shape)


class RowColumnAttention(WholeAttention):
    """Every token attends to its row; then to its column, whose values know their rows by then."""

    def attended(
        self,
        query: Float[jt.Var, "B h w n c"],
        key: Float[jt.Var, "B h w n c"],
        value: Float[jt.Var, "B h w n c"],
        depth: Float[jt.Var, "B h w"],
        prior: GeometryPrior,
    ) -> Float[jt.Var, "B h w n c"]:
        """What each token finds, by way of its row, in the whole map."""
        height, width = depth.shape[1:]
        along_rows = prior(depth, _apart(np.arange(width)))
        value = _along_lines(query, key, value, along_rows)
        along_columns = prior(depth.transpose(0, 2, 1), _apart(np.arange(height)))
        query, key, value = (each.transpose(0, 2, 1, 3, 4) for each in (query, key, value))
        return _along_lines(query, key, value, along_columns).transpose(0, 2, 1, 3, 4)


class Perceptron(jt.Module):
    """Two layers, between them a depthwise 3 x 3 beside its own input."""

    def __init__(self, width: int, hidden: int) -> None:
        self.fc1 = Linear(width, hidden)
        self.dwconv = Surroundings(hidden, kernel=3)
        self.fc2 = Linear(hidden, width)

    def execute(self, tokens: Float[jt.Var, "B h w D"]) -> Float[jt.Var, "B h w D"]:
        hidden = nn.gelu(self.fc1(tokens))
        return self.fc2(self.dwconv(hidden) + hidden)


class Surroundings(jt.Module):
    """A depthwise convolution, under the official name for the one in its module."""

    def __init__(self, width: int, *, kernel: int) -> None:
        self.dwconv = Depthwise(width, kernel=kernel)

    def execute(self, tokens: Float[jt.Var, "B h w D"]) -> Float[jt.Var, "B h w D"]:
        return self.dwconv(tokens)


class PatchEmbed(jt.Module):
    """The stem: four convolutions, to stride 4."""

    def __init__(self, width: int) -> None:
        half = width // 2
        sizes = ((3, half, 2), (half, half, 1), (half, width, 2), (width, width, 1))
        layers = [
            layer
            for inputs, outputs, stride in sizes
            for layer in (
                Conv2d(inputs, outputs, 3, stride=stride),
                BatchNorm2d(outputs, eps=EPS_BATCH),
                GELU(),
            )
        ]
        self.proj = nn.Sequential(*layers[:-1])

    def execute(self, image: Float[jt.Var, "B C H W"]) -> Float[jt.Var, "B D h w"]:
        return self.proj(image)


class PatchMerging(jt.Module):
    """Half the size: a strided convolution, then BatchNorm."""

    def __init__(self, in_channels: int, width: int) -> None:
        self.reduction = Conv2d(in_channels, width, 3, stride=2)
        self.norm = BatchNorm2d(width, eps=EPS_BATCH)

    def execute(self, feature: Float[jt.Var, "B C H W"]) -> Float[jt.Var, "B D h w"]:
        return self.norm(self.reduction(feature))


def rotated(tokens: Float[jt.Var, "B h w n c"], geometry: Geometry) -> Float[jt.Var, "B h w n c"]:
    """Each pair of values (0 and 1, 2 and 3, ...) turned in its plane."""
    pairs = tokens.reshape(*tokens.shape[:-1], -1, 2)
    turned = jt.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).reshape(tokens.shape)
    return tokens * geometry.cosine + turned * geometry.sine


def _along_lines(
    query: Float[jt.Var, "B lines L n c"],
    key: Float[jt.Var, "B lines L n c"],
    value: Float[jt.Var, "B lines L n c"],
    bias: Float[jt.Var, "B n lines L L"],
) -> Float[jt.Var, "B lines L n c"]:
    """Attention of each head within each line."""
    scores = jt.matmul(query.transpose(0, 3, 1, 2, 4), key.transpose(0, 3, 1, 4, 2))
    found = jt.matmul(nn.softmax(scores + bias, dim=-1), value.transpose(0, 3, 1, 2, 4))
    return found.transpose(0, 2, 3, 1, 4)


def _apart(position: np.ndarray) -> Float[np.ndarray, "L L"]:
    return np.abs(position[:, None] - position).astype(np.float32)


def _scaled(
    branch: Float[jt.Var, "B h w D"], factor: Float[jt.Var, "1 1 1 D"] | None
) -> Float[jt.Var, "B h w D"]:
    return branch if factor is None else factor * branch


def _initialise(linear: Linear) -> None:
    linear.weight = jt.array(random.normal(tuple(linear.weight.shape)) * np.float32(LINEAR_STD))
    linear.bias = filled(linear.bias.shape[0], 0.0)
