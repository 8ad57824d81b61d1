"""FCN: convolutions on a feature map, perhaps its input concatenated, then a classifier.

Paper:   Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
         https://arxiv.org/abs/1411.4038
Follows: MMSegmentation 1.2.2 `FCNHead`, align_corners=False. Also the auxiliary head of others.
Weights: MMSegmentation's fcn_* files load through the backbone's key rules.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier, selected, selected_channels


class FCNHead(nn.Module):
    """A chain of convolutions on one map (or on several, resized to the first), a classifier.

    With `concat_input`, one more convolution sees the chain's input beside its output.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int | Sequence[int],
        channels: int,
        num_convs: int,
        kernel: int,
        concat_input: bool,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        width = selected_channels(in_channels, in_index)
        sizes = [width] + [channels] * num_convs
        self.convs = nn.Sequential(*(ConvBNAct(a, b, kernel=kernel) for a, b in pairwise(sizes)))
        self.conv_cat = (
            ConvBNAct(width + channels, channels, kernel=kernel) if concat_input else None
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(sizes[-1], num_classes)

    def hidden(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B _E _k _l"]:
        """What is classified."""
        feature = selected(features, self.in_index)
        hidden = self.convs(feature)
        if self.conv_cat is not None:
            hidden = self.conv_cat(torch.cat([feature, hidden], dim=1))
        return hidden

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))
