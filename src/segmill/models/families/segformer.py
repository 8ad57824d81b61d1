"""SegFormer: a MiT trunk; every stage projected to one width, upsampled and merged.

Paper:   Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
         Transformers", NeurIPS 2021, https://arxiv.org/abs/2105.15203
Follows: MMSegmentation 1.2.2 `SegformerHead`, align_corners=False, as `ConvHead`; transformers'
         `SegformerDecodeHead`, whose projections have neither norm nor ReLU, as `LinearHead`.
Weights: MMSegmentation's segformer_mit-b* load by name into a network with `ConvHead`,
         transformers' by KEYS_FROM_HF and the authors' own (segformer.b*.pth) by KEYS_FROM_NVIDIA
         into one with `LinearHead`.
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.backbones import mit
from segmill.models.layers import ConvBNAct, classifier, resize


def _finest_first(array: np.ndarray) -> np.ndarray:
    """Reorder the inputs of the fusion: transformers concatenates the coarsest stage first."""
    return np.ascontiguousarray(np.concatenate(np.split(array, 4, axis=1)[::-1], axis=1))


KEYS_FROM_HF: tuple[Rule, ...] = (
    Rename(
        r"decode_head\.linear_(?:c|projections)\.(\d)\.proj\.(.+)",
        r"decode_head.convs.\1.\2",
        mit.as_kernel,
    ),
    Rename(
        r"decode_head\.linear_fuse\.weight", "decode_head.fusion_conv.conv.weight", _finest_first
    ),
    Rename(r"decode_head\.batch_norm\.(.+)", r"decode_head.fusion_conv.bn.\1"),
    Rename(r"decode_head\.classifier\.(.+)", r"decode_head.conv_seg.\1"),
)
KEYS_FROM_NVIDIA: tuple[Rule, ...] = (
    Drop(r"decode_head\.conv_seg\..+"),  # inherited there, but `linear_pred` is what classifies
    *(
        Rename(
            rf"decode_head\.linear_c{stage}\.proj\.(.+)",
            rf"decode_head.convs.{stage - 1}.\1",
            mit.as_kernel,
        )
        for stage in (1, 2, 3, 4)
    ),
    Rename(
        r"decode_head\.linear_fuse\.conv\.weight",
        "decode_head.fusion_conv.conv.weight",
        _finest_first,
    ),
    Rename(r"decode_head\.linear_fuse\.bn\.(.+)", r"decode_head.fusion_conv.bn.\1"),
    Rename(r"decode_head\.linear_pred\.(.+)", r"decode_head.conv_seg.\1"),
)


class ConvHead(nn.Module):
    """MMSegmentation's head: each stage is projected by convolution, BatchNorm and ReLU.

    The fusion is linear up to its norm, so it is applied to each stage before upsampling: the same
    sum with a fraction of the multiplications, and nothing is concatenated.
    """

    def __init__(
        self, *, in_channels: Sequence[int], channels: int, dropout: float, num_classes: int
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvBNAct(size, channels, kernel=1) for size in in_channels)
        self.fusion_conv = ConvBNAct(len(in_channels) * channels, channels, kernel=1)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        slices = self.fusion_conv.conv.weight.chunk(len(features), dim=1)
        stages = zip(features, self.convs, slices, strict=True)
        fused = _sum_at_finest([F.conv2d(conv(x), weight) for x, conv, weight in stages])
        hidden = self.fusion_conv.activate(self.fusion_conv.bn(fused))
        return self.conv_seg(self.dropout(hidden))


class LinearHead(nn.Module):
    """transformers' head: each stage is projected by a linear map alone.

    Projection and fusion are then one linear map; it is folded from the two at every call, in
    training too, and applied before upsampling.
    """

    def __init__(
        self, *, in_channels: Sequence[int], channels: int, dropout: float, num_classes: int
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(size, channels, 1) for size in in_channels)
        self.fusion_conv = ConvBNAct(len(in_channels) * channels, channels, kernel=1)
        self.dropout = nn.Dropout(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        slices = self.fusion_conv.conv.weight.flatten(1).chunk(len(features), dim=1)
        stages = zip(features, self.convs, slices, strict=True)
        fused = _sum_at_finest([_folded(x, conv, weight) for x, conv, weight in stages])
        hidden = self.fusion_conv.activate(self.fusion_conv.bn(fused))
        return self.conv_seg(self.dropout(hidden))

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `decode_head.*` from transformers' files and the authors' own."""
        return {"hf": KEYS_FROM_HF, "nvidia": KEYS_FROM_NVIDIA}


def _folded(
    feature: Float[Tensor, "B C h w"], projection: nn.Module, fusion: Float[Tensor, "D D"]
) -> Float[Tensor, "B D h w"]:
    """`fusion` of `projection` of the feature, as one convolution."""
    assert isinstance(projection, nn.Conv2d)
    assert projection.bias is not None
    weight = fusion @ projection.weight.flatten(1)
    return F.conv2d(feature, weight[:, :, None, None], fusion @ projection.bias)


def _sum_at_finest(maps: Sequence[Float[Tensor, "B D _h _w"]]) -> Float[Tensor, "B D h w"]:
    finest, *coarser = maps
    for coarse in coarser:
        finest = finest + resize(coarse, finest.shape[-2:])
    return finest
