"""PoolFormer: a transformer in which averaging over 3 x 3 pixels stands in for attention.

Paper:   Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022,
         https://arxiv.org/abs/2111.11418
Follows: mmpretrain 1.2.0 `PoolFormer` as MMSegmentation 1.2.2 uses it: a norm on each output, and
         the stem frozen. timm's has no such norms.
Weights: MMSegmentation's and mmpretrain's load by name, timm's through KEYS_FROM_TIMM.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.layers import DropPath

KEYS_FROM_MMSEG: tuple[Rule, ...] = (Drop(r"head\..+"),)  # of the trunks trained on ImageNet


def _stage_from_timm(stage: int) -> tuple[Rule, ...]:
    """mmpretrain counts stages and the convolutions between them in one list."""
    block, ours = rf"stages\.{stage}\.blocks\.(\d+)\.", rf"backbone.network.{2 * stage}.\1."
    return (
        Rename(
            rf"stages\.{stage}\.downsample\.conv\.(.+)",
            rf"backbone.network.{2 * stage - 1}.proj.\1",
        ),
        Rename(block + r"layer_scale([12])\.scale", ours + r"layer_scale_\2"),
        Rename(block + r"(.+)", ours + r"\2"),
    )


KEYS_FROM_TIMM: tuple[Rule, ...] = (
    Drop(r"head\..+"),
    Rename(r"stem\.conv\.(.+)", r"backbone.patch_embed.proj.\1"),
    *(rule for stage in range(4) for rule in _stage_from_timm(stage)),
)


class PoolFormer(nn.Module):
    """Four stages at strides 4, 8, 16, 32; each output is normalised.

    `layer_scale` is what the factors of every residual branch start from. `name` is timm's name of
    the pretrained weights that fit, for `weights=timm`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        channels: Sequence[int],
        depths: Sequence[int],
        mlp_ratio: int,
        layer_scale: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        self.channels = tuple(channels)
        self.strides = tuple(4 * 2**level for level in range(len(depths)))
        self.patch_embed = PatchEmbed(in_channels, channels[0], kernel=7, stride=4, padding=2)
        # The original freezes it even without pretrained weights.
        self.patch_embed.requires_grad_(False)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.network = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if level:
                narrow = channels[level - 1]
                self.network.append(PatchEmbed(narrow, width, kernel=3, stride=2, padding=1))
            blocks = (
                Block(width, mlp_ratio * width, layer_scale=layer_scale, rate=next(rates))
                for _ in range(depth)
            )
            self.network.append(nn.Sequential(*blocks))
            self.add_module(f"norm{2 * level}", _norm(width))

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        feature, features = self.patch_embed(image), []
        for index, part in enumerate(self.network):
            feature = part(feature)
            if index % 2 == 0:
                features.append(self.get_submodule(f"norm{index}")(feature))
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's and mmpretrain's files and from timm's."""
        return {"mmseg": KEYS_FROM_MMSEG, "timm": KEYS_FROM_TIMM}


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution."""

    def __init__(
        self, in_channels: int, width: int, *, kernel: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel, stride=stride, padding=padding)

    def forward(self, feature: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.proj(feature)


class Block(nn.Module):
    """Pooling and a perceptron of 1 x 1 convolutions, both residual and scaled per channel."""

    def __init__(self, width: int, hidden: int, *, layer_scale: float, rate: float) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.norm2 = _norm(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Conv2d(width, hidden, 1), "fc2": nn.Conv2d(hidden, width, 1)}
        )
        self.layer_scale_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = DropPath(rate)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        pooled = self.layer_scale_1[:, None, None] * _pooling(self.norm1(feature))
        feature = feature + self.drop_path(pooled)
        hidden = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(feature))))
        return feature + self.drop_path(self.layer_scale_2[:, None, None] * hidden)


def _pooling(feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
    """How the neighbourhood differs from the pixel: the residual then leaves the average."""
    return F.avg_pool2d(feature, 3, stride=1, padding=1, count_include_pad=False) - feature


def _norm(width: int) -> nn.GroupNorm:
    """One group: over channels and pixels alike."""
    return nn.GroupNorm(1, width)
