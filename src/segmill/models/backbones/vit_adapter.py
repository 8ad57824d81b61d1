"""ViT-Adapter: a plain ViT beside a pyramid from convolutions; they exchange what they see.

Paper:   Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023,
         https://arxiv.org/abs/2205.08534
Follows: the authors' `ViTAdapter` for segmentation, all attention global. Deviations: images of any
         size (padded with zeros to multiples of 32, the maps cut back; theirs fails), and what they
         only ever load, the position embedding and the blocks, starts as in timm.
Weights: the published upernet_deit_adapter_* and upernet_augreg_adapter_* (MMSegmentation 0.20) by
         name: `backbone.` patch_embed.proj, pos_embed with an unused class token first, blocks.N of
         timm 0.4.12, level_embed, spm.{stem,conv2..4,fc1..4}, interactions.N.{injector,extractor,
         extra_extractors}, up, norm1..4. timm's ViT and DeiT, also distilled, by its names.
         The BEiT and Uni-Perceiver trunks are other networks.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.deformable import DeformableAttention, pixel_centres
from segmill.models.layers import DropPath, resize

PATCH = 16
MULTIPLE = 32  # of the coarsest map
INTERACTIONS = 4
EPS = 1e-6  # of every LayerNorm

Shapes = Sequence[tuple[int, int]]


class ViTAdapter(nn.Module):
    """Maps at strides 4, 8, 16 and 32, all of the ViT's width.

    Four times the ViT's tokens read the pyramid (injector), go through a quarter of the blocks, and
    are read by the pyramid (extractor). `gamma`, 0 at first, weighs what is injected: an untrained
    adapter leaves the ViT as it is. `image_size` (square) is the one that the position embedding is
    stored for; `deform_ratio` and `ffn_ratio` are widths relative to `channels`. `name` is timm's
    name of the weights that fit, for `weights=timm`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        image_size: int,
        channels: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int,
        drop_path_rate: float,
        stem_channels: int,
        deform_heads: int,
        deform_points: int,
        deform_ratio: float,
        ffn_ratio: float,
    ) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        self.channels: tuple[int, ...] = (channels,) * 4
        self.strides: tuple[int, ...] = (4, 8, 16, 32)
        self.grid = image_size // PATCH
        patches = nn.Conv2d(in_channels, channels, PATCH, stride=PATCH)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, channels))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        options = {"mlp_ratio": mlp_ratio, "qkv_bias": True, "norm_layer": norm}
        self.blocks = nn.Sequential(
            *(Block(channels, num_heads, drop_path=rate, **options) for rate in rates)
        )
        self.level_embed = nn.Parameter(torch.zeros(3, channels))
        self.spm = SpatialPriorModule(in_channels, stem_channels, channels)
        self.interactions = nn.ModuleList(
            Interaction(
                channels,
                heads=deform_heads,
                points=deform_points,
                deform_ratio=deform_ratio,
                ffn_ratio=ffn_ratio,
                drop_path_rate=drop_path_rate,
                extra=2 if index == INTERACTIONS - 1 else 0,
            )
            for index in range(INTERACTIONS)
        )
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (
            nn.BatchNorm2d(channels) for _ in range(4)
        )
        self._initialise()

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B D _h _w"]]:
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        finest, *coarser = self.spm(padded)
        stages, pyramid = self._interact(padded, coarser)
        maps = [finest + self.up(pyramid[0]), *pyramid]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return [
            norm(each + resize(stage, each.shape[-2:]))[
                ..., : -(-height // stride), : -(-width // stride)
            ].contiguous()
            for norm, each, stage, stride in zip(norms, maps, stages, self.strides, strict=True)
        ]

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from the authors' files and from timm's."""
        embedding = Rename(r"(?:backbone\.)?pos_embed", "backbone.pos_embed", self._stored_grid)
        return {
            "mmseg": (embedding,),
            "timm": (
                Drop(r"(?:norm|head|head_dist|fc_norm|pre_logits)\..+|cls_token|dist_token"),
                embedding,
                Rename(r"((?:patch_embed|blocks)\..+)", r"backbone.\1"),
            ),
        }

    def _interact(
        self, image: Float[Tensor, "B C H W"], pyramid: Sequence[Float[Tensor, "B D _h _w"]]
    ) -> tuple[list[Float[Tensor, "B D h w"]], list[Float[Tensor, "B D _k _l"]]]:
        """The ViT's map after each quarter of its blocks, and what has become of the pyramid."""
        patches = self.patch_embed(image)
        grid = (patches.shape[2], patches.shape[3])
        shapes = [(each.shape[2], each.shape[3]) for each in pyramid]
        places = Places(grid, shapes, image.device)
        spatial = torch.cat(
            [
                each.flatten(2).transpose(1, 2) + level
                for each, level in zip(pyramid, self.level_embed, strict=True)
            ],
            dim=1,
        )
        tokens = patches.flatten(2).transpose(1, 2) + self._positions(grid)
        quarter = len(self.blocks) // INTERACTIONS
        stages = []
        for index, interaction in enumerate(self.interactions):
            blocks = self.blocks[index * quarter : (index + 1) * quarter]
            tokens, spatial = interaction(tokens, spatial, blocks, places)
            stages.append(tokens.transpose(1, 2).unflatten(2, grid))
        levels = spatial.transpose(1, 2).split([h * w for h, w in shapes], dim=2)
        return stages, [
            each.unflatten(2, shape) for each, shape in zip(levels, shapes, strict=True)
        ]

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        stored = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        resized = F.interpolate(stored, grid, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)

    def _stored_grid(self, array: np.ndarray) -> np.ndarray:
        """A file's position embedding at the size of this network's, with one class token."""
        stored = torch.from_numpy(np.array(array, np.float32))
        side = math.isqrt(stored.shape[1] - 1)
        patches = stored[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(
            patches, (self.grid, self.grid), mode="bicubic", align_corners=False
        )
        return torch.cat([stored[:, :1], resized.flatten(2).transpose(1, 2)], dim=1).numpy()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.level_embed)
        for part in (self.blocks, self.spm, self.interactions, self.up):
            part.apply(_fill)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.initialise()


class Places:
    """Where the ViT's tokens lie, and the pyramid's: the shapes of their maps, and all centres."""

    def __init__(self, grid: tuple[int, int], shapes: Shapes, device: torch.device) -> None:
        self.grid, self.shapes = grid, shapes
        self.tokens = pixel_centres([grid], device)
        self.pyramid = pixel_centres(shapes, device)


class Interaction(nn.Module):
    """Injector, some of the ViT's blocks, extractor, `extra` more extractors."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        points: int,
        deform_ratio: float,
        ffn_ratio: float,
        drop_path_rate: float,
        extra: int,
    ) -> None:
        super().__init__()
        width = int(deform_ratio * channels)
        attention = partial(
            DeformableAttention, channels, value_width=width, heads=heads, points=points
        )
        self.injector = Injector(channels, attention(levels=3))
        self.extractor, *others = (
            Extractor(
                channels,
                attention(levels=1),
                ffn_width=int(ffn_ratio * channels),
                drop_path_rate=drop_path_rate,
            )
            for _ in range(1 + extra)
        )
        self.extra_extractors = nn.ModuleList(others)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        spatial: Float[Tensor, "B M D"],
        blocks: nn.Module,
        places: Places,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B M D"]]:
        tokens = blocks(self.injector(tokens, spatial, places))
        for extractor in (self.extractor, *self.extra_extractors):
            spatial = extractor(spatial, tokens, places)
        return tokens, spatial


class Injector(nn.Module):
    """The ViT's tokens read the three maps of the pyramid."""

    def __init__(self, channels: int, attention: DeformableAttention) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=EPS)
        self.feat_norm = nn.LayerNorm(channels, eps=EPS)
        self.attn = attention
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        spatial: Float[Tensor, "B M D"],
        places: Places,
    ) -> Float[Tensor, "B N D"]:
        read = self.attn(
            self.query_norm(tokens), self.feat_norm(spatial), places.tokens, places.shapes
        )
        return tokens + self.gamma * read


class Extractor(nn.Module):
    """The pyramid reads the ViT's map, then a perceptron with a convolution in it."""

    def __init__(
        self,
        channels: int,
        attention: DeformableAttention,
        *,
        ffn_width: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=EPS)
        self.feat_norm = nn.LayerNorm(channels, eps=EPS)
        self.attn = attention
        self.ffn = ConvFeedForward(channels, ffn_width)
        self.ffn_norm = nn.LayerNorm(channels, eps=EPS)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        spatial: Float[Tensor, "B M D"],
        tokens: Float[Tensor, "B N D"],
        places: Places,
    ) -> Float[Tensor, "B M D"]:
        read = self.attn(
            self.query_norm(spatial), self.feat_norm(tokens), places.pyramid, [places.grid]
        )
        spatial = spatial + read
        return spatial + self.drop_path(self.ffn(self.ffn_norm(spatial), places.shapes))


class ConvFeedForward(nn.Module):
    """Perceptron with one depthwise convolution, shared by the maps."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, width)
        # A level of its own for the published name `dwconv.dwconv`.
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(width, width, 3, padding=1, groups=width)})
        self.fc2 = nn.Linear(width, channels)

    def forward(self, spatial: Float[Tensor, "B M D"], shapes: Shapes) -> Float[Tensor, "B M D"]:
        hidden = self.fc1(spatial).transpose(1, 2).split([h * w for h, w in shapes], dim=2)
        mixed = [
            self.dwconv["dwconv"](each.unflatten(2, shape)).flatten(2)
            for each, shape in zip(hidden, shapes, strict=True)
        ]
        return self.fc2(F.gelu(torch.cat(mixed, dim=2).transpose(1, 2)))


class SpatialPriorModule(nn.Module):
    """ResNet-like convolutions on the image: maps at strides 4, 8, 16, 32."""

    def __init__(self, in_channels: int, width: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv(in_channels, width, stride=2),
            *_conv(width, width, stride=1),
            *_conv(width, width, stride=1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv(width, 2 * width, stride=2))
        self.conv3 = nn.Sequential(*_conv(2 * width, 4 * width, stride=2))
        self.conv4 = nn.Sequential(*_conv(4 * width, 4 * width, stride=2))
        self.fc1 = nn.Conv2d(width, channels, 1)
        self.fc2 = nn.Conv2d(2 * width, channels, 1)
        self.fc3 = nn.Conv2d(4 * width, channels, 1)
        self.fc4 = nn.Conv2d(4 * width, channels, 1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B D _h _w"]]:
        second = self.conv2(first := self.stem(image))
        fourth = self.conv4(third := self.conv3(second))
        return [self.fc1(first), self.fc2(second), self.fc3(third), self.fc4(fourth)]


def _conv(in_channels: int, channels: int, *, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


def _fill(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
