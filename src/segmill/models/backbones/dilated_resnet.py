"""timm's ResNets and ResNeSts, dilated as MMSegmentation does.

Paper:   Zhang et al., "ResNeSt: Split-Attention Networks", CVPR workshops 2022,
         https://arxiv.org/abs/2004.08955
Follows: MMSegmentation 1.2.2 `ResNeSt` and `ResNetV1c`. In timm dilation replaces stride and
         shortcuts average over 2 x 2 pixels wherever a stage is dilated; in MMSegmentation a stage
         may have both, as FastFCN's do, and only a stride makes a shortcut average.
Weights: those of `TimmBackbone`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers.pool2d_same import AvgPool2dSame
from torch import nn

from segmill.models.backbones.timm_backbone import TimmBackbone


class DilatedResNet(TimmBackbone):
    """A ResNet of timm with bottlenecks, its four stages dilated by `dilations`.

    The first block of a stage has half the dilation, as MMSegmentation's `contract_dilation`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        out_indices: Sequence[int],
        output_stride: int,
        dilations: Sequence[int],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(
            name=name,
            in_channels=in_channels,
            out_indices=out_indices,
            output_stride=output_stride,
            options=options,
        )
        for level, dilation in enumerate(dilations, start=1):
            first, *others = self.trunk.get_submodule(f"layer{level}")
            _dilate(first, max(1, dilation // 2))
            for block in others:
                _dilate(block, dilation)
            if isinstance(first.downsample[0], AvgPool2dSame):  # timm's for stride 1
                first.downsample[0] = nn.Identity()


def _dilate(block: Any, dilation: int) -> None:
    """Set the dilation of the 3 x 3 convolution; its padding keeps the size."""
    conv = block.conv2 if isinstance(block.conv2, nn.Conv2d) else block.conv2.conv
    conv.dilation = conv.padding = (dilation, dilation)
