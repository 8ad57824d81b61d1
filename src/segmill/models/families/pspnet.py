"""PSPNet: average the last feature map over several grids and classify with all of them.

Paper:   Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, https://arxiv.org/abs/1612.01105
Follows: MMSegmentation 1.2.2 `PSPHead` and auxiliary `FCNHead`, align_corners=False.
Weights: MMSegmentation's pspnet_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

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
)


class PSPNet(nn.Module):
    """Backbone, pyramid pooling on its last map, auxiliary head on the one before."""

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
        self.decode_head = PSPHead(
            in_channels=backbone.channels[-1],
            channels=channels,
            grids=grids,
            dropout=dropout,
            num_classes=num_classes,
        )
        self.auxiliary_head = auxiliary_head(
            backbone, channels=auxiliary_channels, dropout=dropout, num_classes=num_classes
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        return self.decode_head(self.backbone(image)[-1])

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of both heads."""
        features = self.backbone(image)
        return decode_and_auxiliary_losses(
            self.decode_head(features[-1]),
            self.auxiliary_head(features[-2]),
            label,
            auxiliary_weight=self.auxiliary_weight,
            class_weight=self.class_weight,
        )

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """The backbone's: the heads are named as in MMSegmentation."""
        return self.backbone.key_rules()


class PSPHead(nn.Module):
    """Pyramid pooling, one 3 x 3 convolution over all levels, classifier."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        grids: Sequence[int],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.psp_modules = PyramidPooling(in_channels=in_channels, channels=channels, grids=grids)
        self.bottleneck = ConvBNAct(in_channels + len(grids) * channels, channels, kernel=3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B K h w"]:
        hidden = self.bottleneck(self.psp_modules(feature))
        return self.conv_seg(self.dropout(hidden))
