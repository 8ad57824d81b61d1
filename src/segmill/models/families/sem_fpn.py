"""Semantic FPN: a feature pyramid; every level is brought to stride 4 in steps of two and summed.

Paper:   Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019,
         https://arxiv.org/abs/1901.02446; Lin et al., "Feature Pyramid Networks for Object
         Detection", CVPR 2017, https://arxiv.org/abs/1612.03144
Follows: MMSegmentation 1.2.2 `FPN` (no norm, nearest upsampling) and `FPNHead`,
         align_corners=False. PoolFormer, Twins and PointRend stand on them too.
Weights: MMSegmentation's fpn_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import Conv, ConvBNAct, classifier, resize


class FPN(nn.Module):
    """Neck: 1 x 1 lateral convolutions, top-down sums, a 3 x 3 convolution on every level."""

    def __init__(self, *, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.channels = (channels,) * len(in_channels)
        self.lateral_convs = nn.ModuleList(Conv(size, channels, kernel=1) for size in in_channels)
        self.fpn_convs = nn.ModuleList(Conv(channels, channels, kernel=3) for _ in in_channels)

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> list[Float[Tensor, "B D _h _w"]]:
        pairs = zip(self.lateral_convs, features, strict=True)
        *finer, coarser = (lateral(feature) for lateral, feature in pairs)
        levels = [coarser]
        for level in reversed(finer):
            coarser = level + F.interpolate(coarser, level.shape[-2:], mode="nearest")
            levels.insert(0, coarser)
        return [smooth(level) for smooth, level in zip(self.fpn_convs, levels, strict=True)]


class FPNHead(nn.Module):
    """Each level: convolutions, each followed by doubling, up to the first one's size; the sum."""

    def __init__(
        self, *, in_channels: Sequence[int], channels: int, dropout: float, num_classes: int
    ) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList(
            _to_finest(size, channels, doublings=level) for level, size in enumerate(in_channels)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D h w"]:
        """What is classified."""
        pairs = zip(self.scale_heads, features, strict=True)
        finest, *others = (head(feature) for head, feature in pairs)
        # An odd size doubles to one more than the finer level has.
        return sum((resize(other, finest.shape[-2:]) for other in others), start=finest)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


def _to_finest(in_channels: int, channels: int, *, doublings: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for index in range(max(1, doublings)):
        steps.append(ConvBNAct(in_channels if index == 0 else channels, channels, kernel=3))
        if doublings:
            steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*steps)
