"""ISANet: dense attention as two sparse ones, among far positions and then among near ones.

Paper:   Huang et al., "Interlaced Sparse Self-Attention for Semantic Segmentation", 2019,
         https://arxiv.org/abs/1907.12273
Follows: MMSegmentation 1.2.2 `ISAHead`, align_corners=False.
Weights: MMSegmentation's isanet_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier
from segmill.models.non_local import map_attention


class ISAHead(nn.Module):
    """Convolution, attention over every n-th position, attention within n x n blocks, classifier.

    `down_factor` is the block's (height, width); maps that it does not divide are padded by zeros,
    which take part. Queries and keys have `isa_channels`.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        isa_channels: int,
        down_factor: tuple[int, int],
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.down_factor = down_factor
        self.in_conv = ConvBNAct(in_channels[in_index], channels, kernel=3)
        self.global_relation = SelfAttention(channels, isa_channels)
        self.local_relation = SelfAttention(channels, isa_channels)
        self.out_conv = ConvBNAct(2 * channels, channels, kernel=1)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        feature = self.in_conv(features[self.in_index])
        return self.out_conv(torch.cat([self.related(feature), feature], dim=1))

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))

    def related(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Both attentions: together they connect every position with every other."""
        (height, width), (block_h, block_w) = feature.shape[-2:], self.down_factor
        extra_h, extra_w = -height % block_h, -width % block_w
        top, left = extra_h // 2, extra_w // 2
        padded = F.pad(feature, (left, extra_w - left, top, extra_h - top))

        batch, channels = padded.shape[:2]
        grid_h, grid_w = padded.shape[2] // block_h, padded.shape[3] // block_w
        blocks = padded.reshape(batch, channels, grid_h, block_h, grid_w, block_w)
        far = blocks.permute(0, 3, 5, 1, 2, 4).reshape(-1, channels, grid_h, grid_w)
        far = self.global_relation(far).reshape(batch, block_h, block_w, channels, grid_h, grid_w)
        near = far.permute(0, 4, 5, 3, 1, 2).reshape(-1, channels, block_h, block_w)
        near = self.local_relation(near).reshape(batch, grid_h, grid_w, channels, block_h, block_w)
        joined = near.permute(0, 3, 1, 4, 2, 5).reshape(padded.shape)
        return joined[..., top : top + height, left : left + width]


class SelfAttention(nn.Module):
    """Attention of one head among all positions of a map, then a projection."""

    def __init__(self, channels: int, key_channels: int) -> None:
        super().__init__()
        self.scale = key_channels**-0.5
        self.key_project = _two_convolutions(channels, key_channels)
        self.query_project = _two_convolutions(channels, key_channels)
        self.value_project = nn.Conv2d(channels, channels, 1)
        self.output_project = ConvBNAct(channels, channels, kernel=1)

    def forward(self, feature: Float[Tensor, "N D h w"]) -> Float[Tensor, "N D h w"]:
        query, key = self.query_project(feature), self.key_project(feature)
        context = map_attention(query, key, self.value_project(feature), scale=self.scale)
        return self.output_project(context)


def _two_convolutions(channels: int, key_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBNAct(channels, key_channels, kernel=1), ConvBNAct(key_channels, key_channels, kernel=1)
    )
