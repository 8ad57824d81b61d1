"""Blocks that two or more families share; parameter names are MMSegmentation's."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.errors import SegmillError
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy

Part = Callable[..., Any]  # of a network: called with in_channels, the channels of all feature maps


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


@runtime_checkable
class Neck(Protocol):
    """Feature maps become other feature maps, of `channels`."""

    channels: tuple[int, ...]

    def __call__(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], /
    ) -> Sequence[Float[Tensor, "B _D _h _w"]]: ...


@runtime_checkable
class HasLosses(Protocol):
    """A head with a loss of its own; the others have the cross-entropy of their logits."""

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]: ...


class Conv(nn.Sequential):
    """A convolution alone, under MMSegmentation's name for the one in its ConvModule."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # it has one by default


class ConvBNAct(nn.Sequential):
    """Convolution without bias, BatchNorm, activation (`activate`; None: none).

    `conv` and `bn` are the names of their weights. At stride 1 odd kernels keep the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)
        if activation is not None:
            self.activate = activation()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class SeparableConv(nn.Sequential):
    """A 3 x 3 convolution per channel, then a 1 x 1 across channels; both with norm.

    A ReLU ends it; `depthwise_activation` stands between the two (None: none).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dilation: int,
        depthwise_activation: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        self.depthwise_conv = ConvBNAct(
            in_channels,
            in_channels,
            kernel=3,
            dilation=dilation,
            groups=in_channels,
            activation=depthwise_activation,
        )
        self.pointwise_conv = ConvBNAct(in_channels, out_channels, kernel=1)


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


def image_pool(in_channels: int, channels: int) -> nn.Sequential:
    """The average over the whole map, reduced to `channels`: the first branch of an ASPP."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBNAct(in_channels, channels, kernel=1))


def pooled_and_branches(
    feature: Float[Tensor, "B D h w"], pool: nn.Module, branches: Iterable[nn.Module]
) -> Float[Tensor, "B _E h w"]:
    """An ASPP's branches side by side: `image_pool`'s value everywhere, then the others."""
    pooled = resize(pool(feature), feature.shape[-2:])
    return torch.cat([pooled, *(branch(feature) for branch in branches)], dim=1)


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


def initialise_trunk(module: nn.Module) -> None:
    """How MiT, Twins and MSCAN start, for `apply`: what is no weight of these two kinds stays."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        rows, columns = module.kernel_size
        fan_out = rows * columns * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def selected(
    features: Sequence[Float[Tensor, "B _D _h _w"]], in_index: int | Sequence[int]
) -> Float[Tensor, "B _E h w"]:
    """One feature map; or several, brought to the size of the first of them, side by side."""
    if isinstance(in_index, int):
        return features[in_index]
    first, *others = (features[index] for index in in_index)
    return torch.cat([first, *(resize(other, first.shape[-2:]) for other in others)], dim=1)


def selected_channels(in_channels: Sequence[int], in_index: int | Sequence[int]) -> int:
    """The channels of what `selected` returns."""
    if isinstance(in_index, int):
        return in_channels[in_index]
    return sum(in_channels[index] for index in in_index)


def resize(feature: Float[Tensor, "B D h w"], size: Sequence[int]) -> Float[Tensor, "B D H W"]:
    """Bilinear with align_corners=False, the convention of every family that calls this."""
    return F.interpolate(feature, tuple(size), mode="bilinear", align_corners=False)


def head_losses(
    head: nn.Module,
    features: Sequence[Float[Tensor, "B _D _h _w"]],
    label: Integer[Tensor, "B H W"],
    class_weight: Sequence[float] | None,
) -> dict[str, Float[Tensor, ""]]:
    """The head's own losses if it has some, else the cross-entropy of its logits."""
    if isinstance(head, HasLosses):
        return head.losses(features, label)
    return {"loss_ce": cross_entropy(head(features), label, class_weight)}


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


def move_statistics_twice(head: nn.Module) -> nn.Module:
    """As if each training step ran the head twice, which the original does in a cascade."""
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum is not None
            module.momentum = 1 - (1 - module.momentum) ** 2
    return head
