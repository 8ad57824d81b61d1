"""FCN: two convolutions on the last feature map, its input concatenated, then a classifier.

Paper:   Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
         https://arxiv.org/abs/1411.4038
Follows: MMSegmentation 1.2.2 `FCNHead` twice (decode and auxiliary), align_corners=False.
Weights: MMSegmentation's fcn_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.layers import (
    Backbone,
    FCNHead,
    auxiliary_head,
    decode_and_auxiliary_losses,
)


class FCN(nn.Module):
    """Backbone, FCN head on its last map, auxiliary head on the one before."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        channels: int,
        num_convs: int,
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
        self.decode_head = FCNHead(
            in_channels=backbone.channels[-1],
            channels=channels,
            num_convs=num_convs,
            concat_input=True,
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
