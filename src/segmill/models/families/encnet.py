"""EncNet: how the pixels differ from learned codewords gates the channels of the last map.

Paper:   Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018,
         https://arxiv.org/abs/1803.08904
Follows: MMSegmentation 1.2.2 `EncHead` with its SE loss and without lateral connections.
Weights: MMSegmentation's encnet_* files load through the backbone's key rules.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier, cross_entropy


class EncHead(nn.Module):
    """A 3 x 3 convolution, context encoding, classifier.

    The encoding also says which classes the image has: `se_weight` is the factor of that loss.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        num_codes: int,
        se_weight: float,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index, self.se_weight, self.num_classes = in_index, se_weight, num_classes
        self.bottleneck = ConvBNAct(in_channels[in_index], channels, kernel=3)
        self.enc_module = EncModule(channels, num_codes=num_codes)
        self.se_layer = nn.Linear(channels, num_classes)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        _, gated = self.enc_module(self.bottleneck(features[self.in_index]))
        return gated

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss_ce` of the pixels and `loss_se`, of the classes that the image has or lacks."""
        encoded, gated = self.enc_module(self.bottleneck(features[self.in_index]))
        presence = present_classes(label, self.num_classes)
        loss_se = F.binary_cross_entropy_with_logits(self.se_layer(encoded), presence)
        return {
            "loss_ce": cross_entropy(self.conv_seg(self.dropout(gated)), label, None),
            "loss_se": self.se_weight * loss_se,
        }


class EncModule(nn.Module):
    """The mean of the encoded residuals, and the map whose channels it gates."""

    def __init__(self, channels: int, *, num_codes: int) -> None:
        super().__init__()
        self.encoding_project = ConvBNAct(channels, channels, kernel=1)
        encoding = Encoding(channels, num_codes=num_codes)
        self.encoding = nn.Sequential(encoding, nn.BatchNorm1d(num_codes), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())

    def forward(
        self, feature: Float[Tensor, "B D h w"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D h w"]]:
        encoded = self.encoding(self.encoding_project(feature)).mean(dim=1)
        gate = self.fc(encoded)[:, :, None, None]
        return encoded, F.relu(feature + feature * gate)


class Encoding(nn.Module):
    """Sum over the pixels of their differences to each codeword, each weighted by its nearness.

    Nearness is a softmax over the codewords of `scale` (negative, learned) times the squared
    distance.
    """

    def __init__(self, channels: int, *, num_codes: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(num_codes * channels)
        self.codewords = nn.Parameter(torch.empty(num_codes, channels).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(num_codes).uniform_(-1, 0))

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B _codes D"]:
        pixels = feature.flatten(2).transpose(1, 2)
        nearness = F.softmax(self.scale * self.squared_distances(pixels), dim=2).to(pixels.dtype)
        # Sums of nearness * (pixel - codeword), without the differences.
        codes = nearness.sum(dim=1)[:, :, None] * self.codewords
        return nearness.transpose(1, 2) @ pixels - codes

    def squared_distances(self, pixels: Float[Tensor, "B N D"]) -> Float[Tensor, "B N _codes"]:
        """|x - c|^2 = |x|^2 - 2 x c + |c|^2: the differences would take as much as 32 maps."""
        # A small difference of large sums: float64, which autocast leaves alone.
        wide, codes = pixels.double(), self.codewords.double()
        of_pixels = wide.square().sum(dim=2, keepdim=True)
        return (of_pixels - 2 * wide @ codes.T + codes.square().sum(dim=1)).float()


def present_classes(label: Integer[Tensor, "B H W"], num_classes: int) -> Float[Tensor, "B K"]:
    """1 for each class that some pixel has, else 0; ignored pixels (255) have none."""
    batch = label.shape[0]
    index = label.flatten(1).long().clamp(max=num_classes)
    presence = torch.zeros(batch, num_classes + 1, device=label.device)
    return presence.scatter_(1, index, 1.0)[:, :num_classes]
