"""Pixel decoders: feature maps become one fine map, to be compared with mask embeddings.

Follows: MMDetection 3.3 `PixelDecoder` as `ConvPixelDecoder` (MaskFormer) and
         `MSDeformAttnPixelDecoder` as `DeformablePixelDecoder` (Mask2Former).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.deformable import DeformableAttention, pixel_centres
from segmill.models.layers import resize
from segmill.models.query_decoder import FeedForward, initialise_matrices, sine_positions, tokens

GROUPS = 32  # of every GroupNorm


class ConvGN(nn.Sequential):
    """Convolution, GroupNorm, perhaps ReLU; `conv` and `gn` are the names of their weights."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        bias: bool,
        activate: bool,
        initialise: Callable[[nn.Conv2d], None],
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
        self.gn = nn.GroupNorm(GROUPS, out_channels)
        if activate:
            self.activate = nn.ReLU(inplace=True)
        initialise(self.conv)


class ConvPixelDecoder(nn.Module):
    """A feature pyramid: laterals and top-down sums (nearest neighbours), convolved on each level.

    Its second output is the coarsest feature map, as it came.
    """

    def __init__(self, *, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        *finer, last = in_channels
        # The original's loop ends one level early: it leaves the third as it was made.
        fills = [*[xavier_caffe2] * (len(finer) - 1), kaiming]
        self.lateral_convs = _laterals(finer, channels, fills)
        self.output_convs = _smoothing(channels, fills)
        self.last_feat_conv = ConvGN(
            last, channels, kernel=3, bias=False, activate=True, initialise=kaiming
        )
        self.mask_feature = nn.Conv2d(channels, channels, 3, padding=1)
        xavier_caffe2(self.mask_feature)

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, "B _E _k _l"]]:
        *finer, last = features
        merged = self.last_feat_conv(last)
        levels = zip(finer, self.lateral_convs, self.output_convs, strict=True)
        for feature, lateral, smooth in reversed(list(levels)):
            hidden = lateral(feature)
            merged = smooth(hidden + F.interpolate(merged, hidden.shape[-2:], mode="nearest"))
        return self.mask_feature(merged), last


class DeformablePixelDecoder(nn.Module):
    """Deformable attention among the coarsest `num_levels` maps, a feature pyramid for the others.

    Its second output are the attended maps, the coarsest first.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        num_levels: int,
        num_layers: int,
        num_heads: int,
        num_points: int,
        hidden: int,
    ) -> None:
        super().__init__()
        finer, coarser = in_channels[:-num_levels], in_channels[-num_levels:]
        self.input_convs = nn.ModuleList(
            ConvGN(size, channels, kernel=1, bias=True, activate=False, initialise=xavier)
            for size in reversed(coarser)
        )
        self.encoder = DeformableEncoder(
            DeformableLayer(
                channels, heads=num_heads, levels=num_levels, points=num_points, hidden=hidden
            )
            for _ in range(num_layers)
        )
        self.level_encoding = nn.Embedding(num_levels, channels)
        fills = [xavier_caffe2] * len(finer)
        self.lateral_convs = _laterals(list(reversed(finer)), channels, fills)
        self.output_convs = _smoothing(channels, fills)
        self.mask_feature = nn.Conv2d(channels, channels, 1)
        xavier_caffe2(self.mask_feature)

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> tuple[Float[Tensor, "B D h w"], list[Float[Tensor, "B D _k _l"]]]:
        levels = len(self.input_convs)
        attended = self._attend(list(reversed(features[-levels:])))
        merged = attended[-1]
        finer = reversed(features[:-levels])
        for feature, lateral, smooth in zip(
            finer, self.lateral_convs, self.output_convs, strict=True
        ):
            hidden = lateral(feature)
            merged = smooth(hidden + resize(merged, hidden.shape[-2:]))
        return self.mask_feature(merged), attended

    def _attend(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> list[Float[Tensor, "B D _h _w"]]:
        maps = [conv(feature) for conv, feature in zip(self.input_convs, features, strict=True)]
        shapes = [(each.shape[2], each.shape[3]) for each in maps]
        positions = torch.cat(
            [
                sine_positions(each) + level
                for each, level in zip(maps, self.level_encoding.weight, strict=True)
            ]
        )
        centres = pixel_centres(shapes, maps[0].device)
        pixels = torch.cat([tokens(each) for each in maps], dim=1)
        query = self.encoder(pixels, positions, centres, shapes)
        levels = query.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
        return [each.unflatten(2, shape) for each, shape in zip(levels, shapes, strict=True)]


class DeformableEncoder(nn.Module):
    """Layers of deformable attention among the pixels of all levels."""

    def __init__(self, layers: Iterable["DeformableLayer"]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        query: Float[Tensor, "B N D"],
        positions: Float[Tensor, "N D"],
        centres: Float[Tensor, "N 2"],
        shapes: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "B N D"]:
        for layer in self.layers:
            query = layer(query, positions, centres, shapes)
        return query


class DeformableLayer(nn.Module):
    """Deformable attention and a perceptron, each residual and then normalised."""

    def __init__(self, width: int, *, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(
            width, value_width=width, heads=heads, levels=levels, points=points
        )
        self.ffn = FeedForward(width, hidden, dropout=0.0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        initialise_matrices(self.ffn, nn.init.xavier_normal_)

    def forward(
        self,
        query: Float[Tensor, "B N D"],
        positions: Float[Tensor, "N D"],
        centres: Float[Tensor, "N 2"],
        shapes: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "B N D"]:
        attended = self.self_attn(query + positions, query, centres, shapes)
        return self.norms[1](self.ffn(self.norms[0](query + attended)))


def xavier_caffe2(conv: nn.Conv2d) -> None:
    """Uniform with the variance 1 / fan in; the bias, if any, is 0."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def xavier(conv: nn.Conv2d) -> None:
    """Uniform by Glorot; the bias is 0."""
    assert conv.bias is not None
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)


def kaiming(conv: nn.Conv2d) -> None:
    """Normal by He, for a ReLU, as any convolution of MMCV's before somebody else fills it."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _laterals(
    in_channels: Sequence[int], channels: int, fills: Sequence[Callable[[nn.Conv2d], None]]
) -> nn.ModuleList:
    return nn.ModuleList(
        ConvGN(size, channels, kernel=1, bias=False, activate=False, initialise=fill)
        for size, fill in zip(in_channels, fills, strict=True)
    )


def _smoothing(channels: int, fills: Sequence[Callable[[nn.Conv2d], None]]) -> nn.ModuleList:
    return nn.ModuleList(
        ConvGN(channels, channels, kernel=3, bias=False, activate=True, initialise=fill)
        for fill in fills
    )
