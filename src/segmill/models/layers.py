"""Blocks that two or more families share; parameter names are MMSegmentation's."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.errors import SegmillError
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy


@runtime_checkable
class Backbone(Protocol):
    """A trunk: an image becomes feature maps, the finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(
        self, image: Float[Tensor, "B C H W"], /
    ) -> Sequence[Float[Tensor, "B _D _h _w"]]: ...

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Origin -> rules from its checkpoint keys to `backbone.*`."""
        ...


class ConvBNAct(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; `conv` and `bn` are the names of their weights."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            # Keeps the size, for the odd kernels that heads have.
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class FCNHead(nn.Module):
    """A chain of convolutions, then a classifier: FCN's own head and the auxiliary one of others.

    With `concat_input`, one more convolution sees the chain's input beside its output.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_convs: int,
        concat_input: bool,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        sizes = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(*(ConvBNAct(a, b, kernel=3) for a, b in pairwise(sizes)))
        self.conv_cat = (
            ConvBNAct(in_channels + channels, channels, kernel=3) if concat_input else None
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B K h w"]:
        hidden = self.convs(feature)
        if self.conv_cat is not None:
            hidden = self.conv_cat(torch.cat([feature, hidden], dim=1))
        return self.conv_seg(self.dropout(hidden))


class PyramidPooling(nn.ModuleList):
    """A feature map beside its averages over several grids, each reduced to `channels`."""

    def __init__(self, *, in_channels: int, channels: int, grids: Sequence[int]) -> None:
        super().__init__(
            nn.Sequential(nn.AdaptiveAvgPool2d(grid), ConvBNAct(in_channels, channels, kernel=1))
            for grid in grids
        )

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B _D h w"]:
        size = feature.shape[-2:]
        return torch.cat([feature, *(resize(branch(feature), size) for branch in self)], dim=1)


class DropPath(nn.Module):
    """Drop a residual branch for some samples of the batch, with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Float[Tensor, "B *size"]) -> Float[Tensor, "B *size"]:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        return branch * (kept / keep)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1 x 1 convolution to logits; it starts close to zero so that classes start equal."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # a Conv2d has a bias unless told otherwise
    return conv


def resize(feature: Float[Tensor, "B D h w"], size: Sequence[int]) -> Float[Tensor, "B D H W"]:
    """Bilinear with align_corners=False, the convention of every family that calls this."""
    return F.interpolate(feature, tuple(size), mode="bilinear", align_corners=False)


def decode_and_auxiliary_losses(
    logits: Float[Tensor, "B K h w"],
    auxiliary_logits: Float[Tensor, "B K _h _w"],
    label: Integer[Tensor, "B H W"],
    *,
    auxiliary_weight: float,
    class_weight: Sequence[float] | None,
) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy of both heads at the label's size; the second one weighted."""
    auxiliary = cross_entropy(auxiliary_logits, label, class_weight)
    return {
        "decode.loss_ce": cross_entropy(logits, label, class_weight),
        "aux.loss_ce": auxiliary_weight * auxiliary,
    }


def cross_entropy(
    logits: Float[Tensor, "B K h w"],
    label: Integer[Tensor, "B H W"],
    class_weight: Sequence[float] | None,
) -> Float[Tensor, ""]:
    """Cross-entropy at the label's size; `class_weight` has one factor for each class."""
    if class_weight is None:
        return upsample_cross_entropy(logits, label)
    if len(class_weight) != logits.shape[1]:
        raise SegmillError(
            f"model.network.class_weight has {len(class_weight)} values, the model has "
            f"{logits.shape[1]} classes. Give one value for each class, or null."
        )
    weight = logits.new_tensor(class_weight, dtype=torch.float32)
    return upsample_cross_entropy(logits, label, class_weight=weight)


def auxiliary_head(
    backbone: Backbone, *, channels: int, dropout: float, num_classes: int
) -> FCNHead:
    """One convolution and a classifier on the last but one map; it helps training only."""
    return FCNHead(
        in_channels=backbone.channels[-2],
        channels=channels,
        num_convs=1,
        concat_input=False,
        dropout=dropout,
        num_classes=num_classes,
    )
