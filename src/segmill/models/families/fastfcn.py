"""FastFCN: an undilated trunk's last three maps are upsampled jointly (JPU) for a usual head.

Paper:   Wu et al., "FastFCN: Rethinking Dilated Convolution in the Backbone for Semantic
         Segmentation", 2019, https://arxiv.org/abs/1903.11816
Follows: MMSegmentation 1.2.2 `JPU`, align_corners=False. Its trunk keeps its strides, but is
         dilated all the same.
Weights: MMSegmentation's fastfcn_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, SeparableConv, resize


class JPU(nn.Module):
    """Neck: all maps at the first one's size, side by side, seen at several dilations at once.

    The result takes the last map's place; the other maps pass unchanged, for an auxiliary head.
    """

    def __init__(
        self, *, in_channels: Sequence[int], channels: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.channels = (*in_channels[:-1], len(dilations) * channels)
        # Lists of one: MMSegmentation's names.
        self.conv_layers = nn.ModuleList(
            nn.Sequential(ConvBNAct(width, channels, kernel=3)) for width in in_channels
        )
        width = len(in_channels) * channels
        self.dilation_layers = nn.ModuleList(
            nn.Sequential(
                SeparableConv(width, channels, dilation=dilation, depthwise_activation=None)
            )
            for dilation in dilations
        )

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> list[Float[Tensor, "B _E _k _l"]]:
        pairs = zip(self.conv_layers, features, strict=True)
        first, *others = (reduce(feature) for reduce, feature in pairs)
        resized = (resize(other, first.shape[-2:]) for other in others)
        pyramid = torch.cat([first, *resized], dim=1)
        joined = torch.cat([layer(pyramid) for layer in self.dilation_layers], dim=1)
        return [*features[:-1], joined]
