"""ViT or DeiT with UPerNet: a neck makes a pyramid of the maps of a plain transformer.

Paper:   the neck is MMSegmentation's own, after the reassembling of Ranftl et al., "Vision
         Transformers for Dense Prediction", ICCV 2021, https://arxiv.org/abs/2103.13413
Follows: MMSegmentation 1.2.2 `MultiLevelNeck`. Without it UPerNet takes four maps of one size
         (vit_deit-s16_upernet).
Weights: MMSegmentation's upernet_vit-* and upernet_deit-* files by name; the published ones need
         model.network.backbone.patch_bias=true.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import Conv


class MultiLevelNeck(nn.Module):
    """Each map is projected, resized by its factor of `scales` and smoothed; nothing is shared."""

    def __init__(
        self, *, in_channels: Sequence[int], channels: int, scales: Sequence[float]
    ) -> None:
        super().__init__()
        self.channels = (channels,) * len(scales)
        self.scales = tuple(scales)
        self.lateral_convs = nn.ModuleList(Conv(size, channels, kernel=1) for size in in_channels)
        self.convs = nn.ModuleList(Conv(channels, channels, kernel=3) for _ in scales)

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> list[Float[Tensor, "B D _h _w"]]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        levels = zip(self.convs, laterals, self.scales, strict=True)
        return [smooth(rescaled(lateral, scale)) for smooth, lateral, scale in levels]


def rescaled(feature: Float[Tensor, "B D h w"], scale: float) -> Float[Tensor, "B D _h _w"]:
    """Bilinear at exactly this scale: an odd size halves to less than half, not to a ratio."""
    return F.interpolate(feature, scale_factor=scale, mode="bilinear", align_corners=False)
