"""HRNet: branches at strides 4, 8, 16, 32 side by side, which exchange features again and again.

Paper:   Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition",
         TPAMI 2020, https://arxiv.org/abs/1908.07919
Follows: MMSegmentation 1.2.2 `HRNet`: coarser branches are upsampled bilinearly where they are
         added to finer ones. timm's HRNet takes the nearest pixel, so this trunk is our own.
Weights: MMSegmentation's load by name; timm's have the same names without the prefix, and the
         layers of its classifier besides. So have the ImageNet weights `hrnetv2_w18` of mmcv.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.layers import resize

STEM = 64
KEYS_FROM_TIMM: tuple[Rule, ...] = (
    Drop(r"(incre_modules|downsamp_modules|final_layer|classifier)\..+"),
    Rename(r"((?:conv|bn|layer|transition|stage)\d\..+)", r"backbone.\1"),
)


class HRNet(nn.Module):
    """Four branches of `channels`; stage n + 2 has n + 2 of them and `num_modules[n]` exchanges.

    `num_blocks` is the number of residual blocks between two exchanges. `name` is timm's name of
    the pretrained weights that fit, for `weights=timm`.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        channels: Sequence[int],
        num_blocks: int,
        num_modules: Sequence[int],
    ) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        self.channels = tuple(channels)
        self.conv1, self.bn1 = _conv_bn(in_channels, STEM, kernel=3, stride=2)
        self.conv2, self.bn2 = _conv_bn(STEM, STEM, kernel=3, stride=2)
        width = STEM * Bottleneck.expansion
        first = Bottleneck(STEM, STEM, downsample=_sequential(STEM, width, kernel=1))
        others = (Bottleneck(width, STEM) for _ in range(num_blocks - 1))
        self.layer1 = nn.Sequential(first, *others)
        before: tuple[int, ...] = (width,)
        for index, count in enumerate(num_modules):
            after = self.channels[: index + 2]
            stage = (HRModule(after, num_blocks=num_blocks) for _ in range(count))
            self.add_module(f"transition{index + 1}", _transition(before, after))
            self.add_module(f"stage{index + 2}", nn.Sequential(*stage))
            before = after
        self.apply(_initialise)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        stem = F.relu(self.bn1(self.conv1(image)))
        features = [self.layer1(F.relu(self.bn2(self.conv2(stem))))]
        for index in range(1, len(self.channels)):
            transition = self.get_submodule(f"transition{index}")
            assert isinstance(transition, nn.ModuleList)
            # The new branch starts from the coarsest one.
            pairs = zip(transition, [*features, features[-1]], strict=True)
            stage = self.get_submodule(f"stage{index + 1}")
            features = stage([step(branch) for step, branch in pairs])
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files and from timm's."""
        return {"mmseg": (), "timm": KEYS_FROM_TIMM}


class HRModule(nn.Module):
    """Residual blocks on every branch; then each branch becomes the sum of all of them."""

    def __init__(self, channels: Sequence[int], *, num_blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width) for _ in range(num_blocks)))
            for width in channels
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_path(channels, source, target) for source in range(len(channels)))
            for target in range(len(channels))
        )

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> list[Float[Tensor, "B _D _h _w"]]:
        pairs = zip(self.branches, features, strict=True)
        features = [branch(feature) for branch, feature in pairs]
        fused = []
        for paths, own in zip(self.fuse_layers, features, strict=True):
            assert isinstance(paths, nn.ModuleList)
            pairs = zip(paths, features, strict=True)
            first, *others = (_fitted(path(feature), own) for path, feature in pairs)
            fused.append(F.relu(sum(others, start=first)))
        return fused


def _path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """From one branch to another: a 1 x 1 convolution and upsampling, or strided convolutions."""
    if source == target:
        return nn.Identity()
    if source > target:
        up = nn.Upsample(scale_factor=2 ** (source - target), mode="bilinear", align_corners=False)
        return nn.Sequential(*_conv_bn(channels[source], channels[target], kernel=1), up)
    width = channels[source]
    steps = (_down(width, width) for _ in range(target - source - 1))
    return nn.Sequential(*steps, _sequential(width, channels[target], kernel=3, stride=2))


def _fitted(feature: Tensor, own: Tensor) -> Tensor:
    """An odd size, halved and doubled, is one more than it was."""
    same = feature.shape[-2:] == own.shape[-2:]
    return feature if same else resize(feature, own.shape[-2:])


def _transition(before: Sequence[int], after: Sequence[int]) -> nn.ModuleList:
    """To the branches of the next stage: the present ones at their new widths, and a new one."""
    present = (
        nn.Identity() if old == new else nn.Sequential(*_conv_bn(old, new, kernel=3), nn.ReLU())
        for old, new in zip(before, after, strict=False)
    )
    return nn.ModuleList([*present, nn.Sequential(_down(before[-1], after[-1]))])


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*_conv_bn(in_channels, out_channels, kernel=3, stride=2), nn.ReLU())


def _sequential(
    in_channels: int, out_channels: int, *, kernel: int, stride: int = 1
) -> nn.Sequential:
    return nn.Sequential(*_conv_bn(in_channels, out_channels, kernel=kernel, stride=stride))


def _conv_bn(
    in_channels: int, out_channels: int, *, kernel: int, stride: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    return conv, nn.BatchNorm2d(out_channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
