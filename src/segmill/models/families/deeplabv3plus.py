"""DeepLabV3+: parallel dilated convolutions on the last map, refined with the first one.

Paper:   Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
         Segmentation", ECCV 2018, https://arxiv.org/abs/1802.02611
Follows: MMSegmentation 1.2.2 `DepthwiseSeparableASPPHead` and auxiliary `FCNHead`,
         align_corners=False.
Weights: MMSegmentation's deeplabv3plus_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.layers import (
    Backbone,
    ConvBNAct,
    auxiliary_head,
    classifier,
    decode_and_auxiliary_losses,
    resize,
)


class DeepLabV3Plus(nn.Module):
    """Backbone, separable ASPP on its last map refined by its first, auxiliary head."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        channels: int,
        dilations: Sequence[int],
        low_level_channels: int,
        auxiliary_channels: int,
        auxiliary_weight: float,
        class_weight: Sequence[float] | None,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliary_weight = auxiliary_weight
        self.class_weight = class_weight
        self.decode_head = SeparableASPPHead(
            in_channels=backbone.channels[-1],
            low_level_in_channels=backbone.channels[0],
            low_level_channels=low_level_channels,
            channels=channels,
            dilations=dilations,
            dropout=dropout,
            num_classes=num_classes,
        )
        self.auxiliary_head = auxiliary_head(
            backbone, channels=auxiliary_channels, dropout=dropout, num_classes=num_classes
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        features = self.backbone(image)
        return self.decode_head(features[0], features[-1])

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of both heads."""
        features = self.backbone(image)
        return decode_and_auxiliary_losses(
            self.decode_head(features[0], features[-1]),
            self.auxiliary_head(features[-2]),
            label,
            auxiliary_weight=self.auxiliary_weight,
            class_weight=self.class_weight,
        )

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """The backbone's: the heads are named as in MMSegmentation."""
        return self.backbone.key_rules()


class SeparableASPPHead(nn.Module):
    """Image pool and dilated branches, merged; then two convolutions at the first map's size."""

    def __init__(
        self,
        *,
        in_channels: int,
        low_level_in_channels: int,
        low_level_channels: int,
        channels: int,
        dilations: Sequence[int],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvBNAct(in_channels, channels, kernel=1)
        )
        self.aspp_modules = nn.ModuleList(
            ConvBNAct(in_channels, channels, kernel=1)
            if dilation == 1
            else SeparableConv(in_channels, channels, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvBNAct((len(dilations) + 1) * channels, channels, kernel=3)
        self.c1_bottleneck = ConvBNAct(low_level_in_channels, low_level_channels, kernel=1)
        self.sep_bottleneck = nn.Sequential(
            SeparableConv(channels + low_level_channels, channels, dilation=1),
            SeparableConv(channels, channels, dilation=1),
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(
        self, low_level: Float[Tensor, "B _D h w"], feature: Float[Tensor, "B _E _h _w"]
    ) -> Float[Tensor, "B K h w"]:
        pooled = resize(self.image_pool(feature), feature.shape[-2:])
        branches = [pooled, *(branch(feature) for branch in self.aspp_modules)]
        context = self.bottleneck(torch.cat(branches, dim=1))
        detail = self.c1_bottleneck(low_level)
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
