"""UPerNet: pyramid pooling on the last feature map, then a feature pyramid over all of them.

Paper:   Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018,
         https://arxiv.org/abs/1807.10221
Follows: MMSegmentation 1.2.2 `UPerHead` and auxiliary `FCNHead`, align_corners=False.
Weights: MMSegmentation's upernet_* and swin-*_upernet files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.layers import (
    Backbone,
    ConvBNAct,
    PyramidPooling,
    auxiliary_head,
    classifier,
    decode_and_auxiliary_losses,
    resize,
)


class UPerNet(nn.Module):
    """Backbone, UPerNet's head on all its maps, auxiliary head on the last but one."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        channels: int,
        grids: Sequence[int],
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
        self.decode_head = UPerHead(
            in_channels=backbone.channels,
            channels=channels,
            grids=grids,
            dropout=dropout,
            num_classes=num_classes,
        )
        self.auxiliary_head = auxiliary_head(
            backbone, channels=auxiliary_channels, dropout=dropout, num_classes=num_classes
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        return self.decode_head(self.backbone(image))

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of both heads."""
        features = self.backbone(image)
        return decode_and_auxiliary_losses(
            self.decode_head(features),
            self.auxiliary_head(features[-2]),
            label,
            auxiliary_weight=self.auxiliary_weight,
            class_weight=self.class_weight,
        )

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """The backbone's: the heads are named as in MMSegmentation."""
        return self.backbone.key_rules()


class UPerHead(nn.Module):
    """Lateral convolutions, top-down sums, one convolution a level, all merged at the finest."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        grids: Sequence[int],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        *finer, last = in_channels
        self.psp_modules = PyramidPooling(in_channels=last, channels=channels, grids=grids)
        self.bottleneck = ConvBNAct(last + len(grids) * channels, channels, kernel=3)
        self.lateral_convs = nn.ModuleList(ConvBNAct(size, channels, kernel=1) for size in finer)
        self.fpn_convs = nn.ModuleList(ConvBNAct(channels, channels, kernel=3) for _ in finer)
        self.fpn_bottleneck = ConvBNAct(len(in_channels) * channels, channels, kernel=3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        *finer, last = features
        coarser = self.bottleneck(self.psp_modules(last))
        levels = [coarser]
        pairs = zip(self.lateral_convs, self.fpn_convs, finer, strict=True)
        for lateral, smooth, feature in reversed(list(pairs)):
            hidden = lateral(feature)
            coarser = hidden + resize(coarser, hidden.shape[-2:])
            levels.insert(0, smooth(coarser))
        size = levels[0].shape[-2:]
        merged = torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(merged)))
