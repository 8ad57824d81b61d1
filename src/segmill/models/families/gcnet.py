"""GCNet: one attended average of the whole map, transformed and added to every position.

Paper:   Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
         ICCVW 2019, https://arxiv.org/abs/1904.11492
Follows: MMSegmentation 1.2.2 `GCHead` with mmcv's `ContextBlock`, align_corners=False.
Weights: MMSegmentation's gcnet_* files load through the backbone's key rules.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import classifier
from segmill.models.non_local import convolutions_around_a_block, hidden_around


class GCHead(nn.Module):
    """Two convolutions with a global context block between them, classifier.

    The block works in ratio x channels.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        ratio: float,
        pooling_type: Literal["att", "avg"],
        fusion_types: Sequence[Literal["channel_add", "channel_mul"]],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.convs, self.conv_cat = convolutions_around_a_block(in_channels[in_index], channels)
        self.gc_block = ContextBlock(
            channels, int(ratio * channels), pooling_type=pooling_type, fusion_types=fusion_types
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        return hidden_around(self.gc_block, self.convs, self.conv_cat, features[self.in_index])

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


class ContextBlock(nn.Module):
    """One vector for the whole map multiplies it, is added to it, or both in this order.

    The vector is an attended ("att") or plain ("avg") average. With "channel_add" alone the block
    starts as the identity.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        *,
        pooling_type: Literal["att", "avg"],
        fusion_types: Sequence[Literal["channel_add", "channel_mul"]],
    ) -> None:
        super().__init__()
        self.conv_mask: nn.Conv2d | None = None
        if pooling_type == "att":
            self.conv_mask = nn.Conv2d(channels, 1, 1)
            nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(self.conv_mask.bias)  # type: ignore[arg-type]  # it has one
        adds, multiplies = "channel_add" in fusion_types, "channel_mul" in fusion_types
        self.channel_add_conv = _transform(channels, inner_channels) if adds else None
        self.channel_mul_conv = _transform(channels, inner_channels) if multiplies else None

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        context = self.context(feature)
        if self.channel_mul_conv is not None:
            feature = feature * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            feature = feature + self.channel_add_conv(context)
        return feature

    def context(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D 1 1"]:
        """The average over positions, attended if there is a mask."""
        if self.conv_mask is None:
            return feature.mean(dim=(2, 3), keepdim=True)
        mask = self.conv_mask(feature).flatten(2).softmax(dim=2)
        return (feature.flatten(2) @ mask.transpose(1, 2)).unsqueeze(3)


def _transform(channels: int, inner_channels: int) -> nn.Sequential:
    """A bottleneck on a 1 x 1 map whose last layer starts as zero."""
    last = nn.Conv2d(inner_channels, channels, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # a Conv2d has a bias unless told otherwise
    return nn.Sequential(
        nn.Conv2d(channels, inner_channels, 1),
        nn.LayerNorm([inner_channels, 1, 1]),
        nn.ReLU(),
        last,
    )
