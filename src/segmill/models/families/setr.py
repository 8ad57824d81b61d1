"""SETR: a ViT encoder; convolutions and upsampling decode it, from one map or from several.

Paper:   Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective
         with Transformers", CVPR 2021, https://arxiv.org/abs/2012.15840
Follows: MMSegmentation 1.2.2 `SETRUPHead` (naive, and progressive upsampling: PUP), `SETRMLAHead`
         and `MLANeck` (multi-level aggregation), align_corners=False.
Weights: MMSegmentation's setr_* files by name; the published ones need
         model.network.backbone.patch_bias=true.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier


class SETRUPHead(nn.Module):
    """LayerNorm, then convolutions, each followed by upsampling by `up_scale`; a classifier."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        num_convs: int,
        kernel: int,
        up_scale: int,
        norm_eps: float,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        sizes = [in_channels[in_index]] + [channels] * num_convs
        self.norm = nn.LayerNorm(sizes[0], eps=norm_eps)
        self.up_convs = nn.ModuleList(
            nn.Sequential(ConvBNAct(a, b, kernel=kernel), upsampling(up_scale))
            for a, b in pairwise(sizes)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(sizes[-1], num_classes)

    def hidden(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B _E _k _l"]:
        """What is classified."""
        hidden = normed(features[self.in_index], self.norm)
        for up_conv in self.up_convs:
            hidden = up_conv(hidden)
        return hidden

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


class MLANeck(nn.Module):
    """Each map normalised and reduced; sums from the last map to the first, a convolution each.

    The outputs come in the order of the sums: the last map's first.
    """

    def __init__(self, *, in_channels: Sequence[int], channels: int, norm_eps: float) -> None:
        super().__init__()
        self.channels = (channels,) * len(in_channels)
        self.norm = nn.ModuleList(nn.LayerNorm(size, eps=norm_eps) for size in in_channels)
        reduce = [ConvBNAct(size, channels, kernel=1) for size in in_channels]
        smooth = [ConvBNAct(channels, channels, kernel=3) for _ in in_channels]
        self.mla = nn.ModuleDict(
            {"channel_proj": nn.ModuleList(reduce), "feat_extract": nn.ModuleList(smooth)}
        )

    def forward(
        self, features: Sequence[Float[Tensor, "B _D h w"]]
    ) -> list[Float[Tensor, "B D h w"]]:
        reduce, smooth = self.mla.values()
        parts = zip(reduce, self.norm, features, strict=True)  # pyright: ignore[reportArgumentType]
        reduced = [conv(normed(feature, norm)) for conv, norm, feature in parts]
        sums = accumulate(reversed(reduced))
        return [conv(total) for conv, total in zip(smooth, sums, strict=True)]  # pyright: ignore[reportArgumentType]


class SETRMLAHead(nn.Module):
    """Two convolutions on every map, upsampled by `up_scale` and classified side by side.

    `channels` is the width of one map's branch.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        up_scale: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.up_convs = nn.ModuleList(
            nn.Sequential(
                ConvBNAct(size, channels, kernel=3),
                ConvBNAct(channels, channels, kernel=3),
                upsampling(up_scale),
            )
            for size in in_channels
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(len(in_channels) * channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D h w"]]) -> Float[Tensor, "B _E _k _l"]:
        """What is classified."""
        branches = zip(self.up_convs, features, strict=True)
        return torch.cat([up_conv(feature) for up_conv, feature in branches], dim=1)

    def forward(self, features: Sequence[Float[Tensor, "B _D h w"]]) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


def upsampling(scale: int) -> nn.Upsample:
    """Bilinear, by a whole factor."""
    return nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False)


def normed(feature: Float[Tensor, "B D h w"], norm: nn.Module) -> Float[Tensor, "B D h w"]:
    """The LayerNorm of every pixel's channels."""
    return norm(feature.movedim(1, -1)).movedim(-1, 1)
