"""DeepLabV3: parallel dilated convolutions on the last map beside its average, then a classifier.

Paper:   Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017,
         https://arxiv.org/abs/1706.05587
Follows: MMSegmentation 1.2.2 `ASPPHead`, align_corners=False.
Weights: MMSegmentation's deeplabv3_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier, image_pool, pooled_and_branches


class ASPPHead(nn.Module):
    """Image pool and dilated branches, merged by one 3 x 3 convolution; classifier."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        dilations: Sequence[int],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        width = in_channels[in_index]
        self.image_pool = image_pool(width, channels)
        self.aspp_modules = nn.ModuleList(
            ConvBNAct(width, channels, kernel=1 if dilation == 1 else 3, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvBNAct((len(dilations) + 1) * channels, channels, kernel=3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        feature = features[self.in_index]
        return self.bottleneck(pooled_and_branches(feature, self.image_pool, self.aspp_modules))

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))
