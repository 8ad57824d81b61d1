"""PSPNet: average the last feature map over several grids and classify with all of them.

Paper:   Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, https://arxiv.org/abs/1612.01105
Follows: MMSegmentation 1.2.2 `PSPHead`, align_corners=False.
Weights: MMSegmentation's pspnet_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, PyramidPooling, classifier


class PSPHead(nn.Module):
    """Pyramid pooling, one 3 x 3 convolution over all levels, classifier."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        grids: Sequence[int],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        width = in_channels[in_index]
        self.psp_modules = PyramidPooling(in_channels=width, channels=channels, grids=grids)
        self.bottleneck = ConvBNAct(width + len(grids) * channels, channels, kernel=3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        return self.bottleneck(self.psp_modules(features[self.in_index]))

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))
