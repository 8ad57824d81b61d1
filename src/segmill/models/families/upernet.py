"""UPerNet: pyramid pooling on the last feature map, then a feature pyramid over all of them.

Paper:   Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018,
         https://arxiv.org/abs/1807.10221
Follows: MMSegmentation 1.2.2 `UPerHead`, align_corners=False.
Weights: MMSegmentation's upernet_* and swin-*_upernet files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, PyramidPooling, classifier, resize


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

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D h w"]:
        """What is classified."""
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
        return self.fpn_bottleneck(merged)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        return self.conv_seg(self.dropout(self.hidden(features)))
