"""STDC: blocks whose convolutions shrink in width and are concatenated; a path brings context up.

Paper:   Fan et al., "Rethinking BiSeNet For Real-time Semantic Segmentation", CVPR 2021,
         https://arxiv.org/abs/2104.13188
Follows: MMSegmentation 1.2.2 `STDCNet` (four convolutions a block, concatenated) inside
         `STDCContextPathNet`, nearest upsampling.
Weights: MMSegmentation's stdc* files load by name, its ImageNet files (`stages.*`) through
         `KEYS_FROM_MMSEG`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Rename, Rule
from segmill.models.layers import ConvBNAct

# The trunk is the backbone of the backbone.
KEYS_FROM_MMSEG: tuple[Rule, ...] = (Rename(r"backbone\.(stages\..+)", r"backbone.backbone.\1"),)


class STDCContextPath(nn.Module):
    """Four maps: the trunk's at stride 8, context at 16 and 8, and the first and last fused.

    `stage_channels` are those of the trunk at strides 2 to 32, `num_blocks` the blocks of its last
    three stages.
    """

    strides = (8, 16, 8, 8)

    def __init__(
        self,
        *,
        in_channels: int,
        stage_channels: Sequence[int],
        num_blocks: Sequence[int],
        context_channels: int,
        fused_channels: int,
    ) -> None:
        super().__init__()
        fine, middle, coarse = stage_channels[2:]
        self.channels = (fine, context_channels, context_channels, fused_channels)
        self.backbone = STDCNet(in_channels, stage_channels, num_blocks)
        self.arms = nn.ModuleList(
            AttentionRefinement(width, context_channels) for width in (coarse, middle)
        )
        self.convs = nn.ModuleList(
            ConvBNAct(context_channels, context_channels, kernel=3) for _ in self.arms
        )
        self.conv_avg = ConvBNAct(coarse, context_channels, kernel=1)
        self.ffm = FeatureFusion(fine + context_channels, fused_channels)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        fine, middle, coarse = self.backbone(image)
        above = self.conv_avg(F.adaptive_avg_pool2d(coarse, 1))
        context = []
        steps = ((coarse, middle), (middle, fine))
        for arm, smooth, (feature, finer) in zip(self.arms, self.convs, steps, strict=True):
            refined = arm(feature) + above
            above = smooth(F.interpolate(refined, finer.shape[-2:], mode="nearest"))
            context.append(above)
        return [fine, *context, self.ffm(torch.cat([fine, above], dim=1))]

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files."""
        return {"mmseg": KEYS_FROM_MMSEG}


class STDCNet(nn.Module):
    """Two strided convolutions, then three stages of blocks; the maps at strides 8, 16, 32."""

    def __init__(
        self, in_channels: int, stage_channels: Sequence[int], num_blocks: Sequence[int]
    ) -> None:
        super().__init__()
        first, second, *deep = stage_channels
        self.stages = nn.ModuleList(
            [
                ConvBNAct(in_channels, first, kernel=3, stride=2),
                ConvBNAct(first, second, kernel=3, stride=2),
            ]
        )
        before = second
        for width, count in zip(deep, num_blocks, strict=True):
            others = (STDCBlock(width, width, stride=1) for _ in range(count - 1))
            self.stages.append(nn.Sequential(STDCBlock(before, width, stride=2), *others))
            before = width

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        feature, features = image, []
        for stage in self.stages:
            feature = stage(feature)
            features.append(feature)
        return features[2:]


class STDCBlock(nn.Module):
    """Four convolutions of a half, a quarter, an eighth, an eighth of the width, concatenated.

    With stride 2 the second one sees the first one's map halved by a convolution per channel,
    the output has it averaged.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        half, quarter, eighth = channels // 2, channels // 4, channels // 8
        self.layers = nn.ModuleList(
            [
                ConvBNAct(in_channels, half, kernel=1),
                ConvBNAct(half, quarter, kernel=3),
                ConvBNAct(quarter, eighth, kernel=3),
                ConvBNAct(eighth, eighth, kernel=3),
            ]
        )
        self.downsample: nn.Module = nn.Identity()
        self.skip: nn.Module = nn.Identity()
        if stride == 2:
            self.downsample = ConvBNAct(
                half, half, kernel=3, stride=2, groups=half, activation=None
            )
            self.skip = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E _h _w"]:
        first, *others = self.layers
        wide = first(feature)
        outputs, current = [self.skip(wide)], self.downsample(wide)
        for layer in others:
            current = layer(current)
            outputs.append(current)
        return torch.cat(outputs, dim=1)


class AttentionRefinement(nn.Module):
    """A convolution whose channels are weighed by what their averages say."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv_layer = ConvBNAct(in_channels, channels, kernel=3)
        self.atten_conv_layer = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            ConvBNAct(channels, channels, kernel=1, activation=None),
            nn.Sigmoid(),
        )

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h w"]:
        hidden = self.conv_layer(feature)
        return hidden * self.atten_conv_layer(hidden)


class FeatureFusion(nn.Module):
    """A 1 x 1 convolution, and once more what the averages say of its channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.conv0 = ConvBNAct(in_channels, channels, kernel=1)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            _Conv(channels, narrow, nn.ReLU()),
            _Conv(narrow, channels, nn.Identity()),
            nn.Sigmoid(),
        )

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h w"]:
        hidden = self.conv0(feature)
        return hidden * self.attention(hidden) + hidden


class _Conv(nn.Sequential):
    """A 1 x 1 convolution without norm and bias, under its name in MMSegmentation."""

    def __init__(self, in_channels: int, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.activate = activation
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
