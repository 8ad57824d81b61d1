"""MSCAN, SegNeXt's trunk: attention weights made by depthwise convolutions of several lengths.

Paper:   Guo et al., "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation",
         NeurIPS 2022, https://arxiv.org/abs/2209.08575
Follows: MMSegmentation 1.2.2 `MSCAN`: BatchNorm inside the blocks, a LayerNorm after each stage.
Weights: MMSegmentation's load by name; the authors' segnext_*.pth and the mscan_*.pth of both
         through KEYS_FROM_MMSEG.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.layers import DropPath, initialise_trunk

KEYS_FROM_MMSEG: tuple[Rule, ...] = (
    Drop(r"backbone\.head\..+"),  # of the trunks trained on ImageNet
    # The authors' depthwise convolution of the perceptron is a module in a module.
    Rename(r"(.+\.mlp\.dwconv)\.dwconv\.(.+)", r"\1.\2"),
)
STRIPS = (7, 11, 21)  # pixels
LAYER_SCALE = 1e-2


class MSCAN(nn.Module):
    """Four stages at strides 4, 8, 16, 32; each output is normalised."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[int],
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.strides = tuple(4 * 2**level for level in range(len(depths)))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        inputs = (in_channels, *channels[:-1])
        for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            embed = PatchEmbed(inputs[level], width) if level else Stem(in_channels, width)
            blocks = [
                Block(width, mlp_ratios[level] * width, rate=next(rates)) for _ in range(depth)
            ]
            # Stages count from 1 in the weights' names.
            self.add_module(f"patch_embed{level + 1}", embed)
            self.add_module(f"block{level + 1}", nn.Sequential(*blocks))
            self.add_module(f"norm{level + 1}", nn.LayerNorm(width))
        self.apply(initialise_trunk)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        feature, features = image, []
        for stage in range(1, len(self.channels) + 1):
            embedded = self.get_submodule(f"patch_embed{stage}")(feature)
            mixed = self.get_submodule(f"block{stage}")(embedded)
            normed = self.get_submodule(f"norm{stage}")(mixed.permute(0, 2, 3, 1))
            feature = normed.permute(0, 3, 1, 2)
            features.append(feature)
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files and the authors' own."""
        return {"mmseg": KEYS_FROM_MMSEG}


class Stem(nn.Module):
    """Two strided convolutions, to stride 4."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, width // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.proj(image)


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then BatchNorm."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, feature: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.norm(self.proj(feature))


class Block(nn.Module):
    """Convolutional attention and a perceptron, both residual and scaled per channel."""

    def __init__(self, width: int, hidden: int, *, rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = SpatialAttention(width)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = Perceptron(width, hidden)
        self.layer_scale_1 = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.drop_path = DropPath(rate)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        attended = self.layer_scale_1[:, None, None] * self.attn(self.norm1(feature))
        feature = feature + self.drop_path(attended)
        hidden = self.layer_scale_2[:, None, None] * self.mlp(self.norm2(feature))
        return feature + self.drop_path(hidden)


class SpatialAttention(nn.Module):
    """The gating unit between two 1 x 1 convolutions, with a residual of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.spatial_gating_unit = GatingUnit(width)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        return feature + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(feature))))


class GatingUnit(nn.Module):
    """Every value times a weight that it gets from its surroundings, near and far.

    A square depthwise kernel, then beside it pairs of strips, one lying and one standing, in place
    of large squares; a 1 x 1 convolution over their sum.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = _depthwise(width, (5, 5))
        for index, length in enumerate(STRIPS):
            self.add_module(f"conv{index}_1", _depthwise(width, (1, length)))
            self.add_module(f"conv{index}_2", _depthwise(width, (length, 1)))
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        near = total = self.conv0(feature)
        for index in range(len(STRIPS)):
            lying, standing = (self.get_submodule(f"conv{index}_{each}") for each in (1, 2))
            total = total + standing(lying(near))
        return self.conv3(total) * feature


class Perceptron(nn.Module):
    """Two 1 x 1 convolutions, between them a depthwise 3 x 3 that knows positions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = _depthwise(hidden, (3, 3))
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        return self.fc2(F.gelu(self.dwconv(self.fc1(feature))))


def _depthwise(width: int, kernel: tuple[int, int]) -> nn.Conv2d:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(width, width, kernel, padding=padding, groups=width)
