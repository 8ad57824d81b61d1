"""DeepLabV3+: parallel dilated convolutions on the last map, refined with the first one.

Paper:   Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
         Segmentation", ECCV 2018, https://arxiv.org/abs/1802.02611
Follows: MMSegmentation 1.2.2 `DepthwiseSeparableASPPHead`, align_corners=False.
Weights: MMSegmentation's deeplabv3plus_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier, resize


class SeparableASPPHead(nn.Module):
    """Image pool and dilated branches, merged; then two convolutions at the first map's size."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        dilations: Sequence[int],
        low_level_channels: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        width = in_channels[in_index]
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvBNAct(width, channels, kernel=1)
        )
        self.aspp_modules = nn.ModuleList(
            ConvBNAct(width, channels, kernel=1)
            if dilation == 1
            else SeparableConv(width, channels, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvBNAct((len(dilations) + 1) * channels, channels, kernel=3)
        self.c1_bottleneck = ConvBNAct(in_channels[0], low_level_channels, kernel=1)
        self.sep_bottleneck = nn.Sequential(
            SeparableConv(channels + low_level_channels, channels, dilation=1),
            SeparableConv(channels, channels, dilation=1),
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        feature = features[self.in_index]
        pooled = resize(self.image_pool(feature), feature.shape[-2:])
        branches = [pooled, *(branch(feature) for branch in self.aspp_modules)]
        context = self.bottleneck(torch.cat(branches, dim=1))
        detail = self.c1_bottleneck(features[0])
        merged = torch.cat([resize(context, detail.shape[-2:]), detail], dim=1)
        return self.conv_seg(self.dropout(self.sep_bottleneck(merged)))


class SeparableConv(nn.Sequential):
    """A 3 x 3 convolution per channel, then a 1 x 1 across channels; both with norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, dilation: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvBNAct(
            in_channels, in_channels, kernel=3, dilation=dilation, groups=in_channels
        )
        self.pointwise_conv = ConvBNAct(in_channels, out_channels, kernel=1)
