"""MobileNetV2: inverted residuals, thin between blocks and wide inside of them.

Paper:   Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
         https://arxiv.org/abs/1801.04381
Follows: MMSegmentation 1.2.2 `MobileNetV2` of width 1. Only the first block of a dilated stage is
         dilated; timm dilates all of them, so this trunk is our own.
Weights: MMSegmentation's and MMPretrain's load by name; timm's through `KEYS_FROM_TIMM`.
"""

from collections.abc import Sequence
from itertools import accumulate

from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.layers import ConvBNAct

STEM = 32
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))

# MMPretrain's classifier; MMSegmentation leaves both out.
KEYS_FROM_MMSEG: tuple[Rule, ...] = (Drop(r"backbone\.conv2\..+|head\.fc\..+"),)


def _keys_from_timm() -> tuple[Rule, ...]:
    """timm names the convolutions of a block by their kind and numbers its norms from 1."""
    rules: list[Rule] = [
        Drop(r"(conv_head|bn2|classifier)\..+"),
        Rename(r"conv_stem\.(.+)", r"backbone.conv1.conv.\1"),
        Rename(r"bn1\.(.+)", r"backbone.conv1.bn.\1"),
    ]
    for stage, (expansion, _, _) in enumerate(STAGES):
        block = rf"blocks\.{stage}\.(\d)\."
        ours = rf"backbone.layer{stage + 1}.\1.conv."
        names = ("conv_dw", "conv_pw") if expansion == 1 else ("conv_pw", "conv_dw", "conv_pwl")
        for index, name in enumerate(names):
            rules.append(Rename(block + rf"{name}\.(.+)", ours + rf"{index}.conv.\2"))
            rules.append(Rename(block + rf"bn{index + 1}\.(.+)", ours + rf"{index}.bn.\2"))
    return tuple(rules)


KEYS_FROM_TIMM: tuple[Rule, ...] = _keys_from_timm()


class MobileNetV2(nn.Module):
    """Seven stages, `layer1` to `layer7`; `out_indices` counts them from 0.

    `strides` are of each stage's first block, `dilations` of that block's 3 x 3 convolution. `name`
    is timm's name of the pretrained weights that fit, for `weights=timm`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        strides: Sequence[int],
        dilations: Sequence[int],
        out_indices: Sequence[int],
    ) -> None:
        super().__init__()
        self.name, self.in_channels, self.out_indices = name, in_channels, tuple(out_indices)
        total = list(accumulate(strides, lambda before, stride: before * stride, initial=2))[1:]
        self.channels = tuple(STAGES[index][1] for index in self.out_indices)
        self.strides = tuple(total[index] for index in self.out_indices)
        self.conv1 = ConvBNAct(in_channels, STEM, kernel=3, stride=2, activation=nn.ReLU6)
        width = STEM
        settings = zip(STAGES, strides, dilations, strict=True)
        for index, ((expansion, channels, num_blocks), stride, dilation) in enumerate(settings):
            first = InvertedResidual(width, channels, expansion, stride, dilation)
            others = (
                InvertedResidual(channels, channels, expansion, stride=1, dilation=1)
                for _ in range(num_blocks - 1)
            )
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *others))
            width = channels

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        feature, features = self.conv1(image), []
        for index in range(len(STAGES)):
            feature = self.get_submodule(f"layer{index + 1}")(feature)
            if index in self.out_indices:
                features.append(feature)
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files and from timm's."""
        return {"mmseg": KEYS_FROM_MMSEG, "timm": KEYS_FROM_TIMM}


class InvertedResidual(nn.Module):
    """Widen (unless `expansion` is 1), filter each channel, narrow; no activation at the end."""

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        width = expansion * in_channels
        widen = [ConvBNAct(in_channels, width, kernel=1, activation=nn.ReLU6)]
        self.conv = nn.Sequential(
            *(widen if expansion > 1 else []),
            ConvBNAct(
                width,
                width,
                kernel=3,
                stride=stride,
                dilation=dilation,
                groups=width,
                activation=nn.ReLU6,
            ),
            ConvBNAct(width, out_channels, kernel=1, activation=None),
        )
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B _E _k _l"]:
        changed = self.conv(feature)
        return feature + changed if self.is_residual else changed
