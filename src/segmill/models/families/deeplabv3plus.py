"""DeepLabV3+: parallel dilated convolutions on the last map, refined with the first one.

Paper:   Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
         Segmentation", ECCV 2018, https://arxiv.org/abs/1802.02611
Follows: MMSegmentation 1.2.2 `DepthwiseSeparableASPPHead`, align_corners=False.
Weights: MMSegmentation's deeplabv3plus_* files load through the backbone's key rules.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import (
    ConvBNAct,
    SeparableConv,
    classifier,
    image_pool,
    pooled_and_branches,
    resize,
)

Separable = partial(SeparableConv, depthwise_activation=nn.ReLU)


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
        self.image_pool = image_pool(width, channels)
        self.aspp_modules = nn.ModuleList(
            ConvBNAct(width, channels, kernel=1)
            if dilation == 1
            else Separable(width, channels, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvBNAct((len(dilations) + 1) * channels, channels, kernel=3)
        self.c1_bottleneck = ConvBNAct(in_channels[0], low_level_channels, kernel=1)
        self.sep_bottleneck = nn.Sequential(
            Separable(channels + low_level_channels, channels, dilation=1),
            Separable(channels, channels, dilation=1),
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        feature = features[self.in_index]
        context = self.bottleneck(pooled_and_branches(feature, self.image_pool, self.aspp_modules))
        detail = self.c1_bottleneck(features[0])
        merged = torch.cat([resize(context, detail.shape[-2:]), detail], dim=1)
        return self.conv_seg(self.dropout(self.sep_bottleneck(merged)))
