"""OCRNet: each pixel attends to the classes, each summed up by the pixels of a first segmentation.

Paper:   Yuan et al., "Object-Contextual Representations for Semantic Segmentation", ECCV 2020,
         https://arxiv.org/abs/1909.11065
Follows: MMSegmentation 1.2.2 `OCRHead` behind an FCN head in a `CascadeEncoderDecoder`,
         align_corners=False.
Weights: MMSegmentation's ocrnet_* files load by name.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.layers import (
    Backbone,
    ConvBNAct,
    Part,
    classifier,
    cross_entropy,
    move_statistics_twice,
    selected,
    selected_channels,
)


class OCRNet(nn.Module):
    """The logits of `coarse_head` guide `decode_head`, whose logits are the network's.

    They are `decode_head.0` and `decode_head.1`, as in MMSegmentation. `coarse_weight` is that of
    the first one's cross-entropy, `class_weight` has one factor for each class.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        coarse_head: Part,
        coarse_weight: float,
        decode_head: Part,
        class_weight: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        coarse = move_statistics_twice(coarse_head(in_channels=backbone.channels))
        self.decode_head = nn.ModuleList([coarse, decode_head(in_channels=backbone.channels)])
        self.coarse_weight = coarse_weight
        self.class_weight = class_weight

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K _h _w"]:
        return self._both(image)[1]

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """`decode_0.*` and `decode_1.*`: MMSegmentation's names."""
        coarse, logits = self._both(image)
        first = cross_entropy(coarse, label, self.class_weight)
        second = cross_entropy(logits, label, self.class_weight)
        return {"decode_0.loss_ce": self.coarse_weight * first, "decode_1.loss_ce": second}

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Those of the backbone; the heads have their weights by name."""
        return self.backbone.key_rules()

    def _both(
        self, image: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B K _h _w"], Float[Tensor, "B K _h _w"]]:
        features = self.backbone(image)
        coarse_head, head = self.decode_head
        coarse = coarse_head(features)
        return coarse, head(features, coarse)


class OCRHead(nn.Module):
    """Pixels beside what they gather from the classes, classified.

    It reads the maps of `in_index` side by side, at the size of the first of them, which is also
    the size of the logits that guide it. `ocr_channels` are compared.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int | Sequence[int],
        channels: int,
        ocr_channels: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.bottleneck = ConvBNAct(selected_channels(in_channels, in_index), channels, kernel=3)
        self.object_context_block = ObjectAttention(channels, ocr_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], coarse: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B K h w"]:
        feature = self.bottleneck(selected(features, self.in_index))
        hidden = self.object_context_block(feature, class_features(feature, coarse))
        return self.conv_seg(self.dropout(hidden))


class ObjectAttention(nn.Module):
    """Pixels ask, classes answer; the answers are joined to the pixels."""

    def __init__(self, channels: int, ocr_channels: int) -> None:
        super().__init__()
        self.query_project = _two_convolutions(channels, ocr_channels)
        self.key_project = _two_convolutions(channels, ocr_channels)
        self.value_project = ConvBNAct(channels, ocr_channels, kernel=1)
        self.out_project = ConvBNAct(ocr_channels, channels, kernel=1)
        self.bottleneck = ConvBNAct(2 * channels, channels, kernel=1)

    def forward(
        self, feature: Float[Tensor, "B D h w"], classes: Float[Tensor, "B D K 1"]
    ) -> Float[Tensor, "B D h w"]:
        query, key, value = (
            project(source).flatten(2).transpose(1, 2)[:, None]  # one head: what exporters expect
            for project, source in (
                (self.query_project, feature),
                (self.key_project, classes),
                (self.value_project, classes),
            )
        )
        answer = F.scaled_dot_product_attention(query, key, value)
        context = self.out_project(answer[:, 0].mT.unflatten(2, feature.shape[-2:]))
        return self.bottleneck(torch.cat([context, feature], dim=1))


def class_features(
    feature: Float[Tensor, "B D h w"], logits: Float[Tensor, "B K h w"]
) -> Float[Tensor, "B D K 1"]:
    """The mean feature of each class; a softmax of its logits over all pixels is the weight."""
    weight = logits.flatten(2).softmax(dim=2)
    return (feature.flatten(2) @ weight.transpose(1, 2)).unsqueeze(3)


def _two_convolutions(in_channels: int, channels: int) -> nn.Sequential:
    first = ConvBNAct(in_channels, channels, kernel=1)
    return nn.Sequential(first, ConvBNAct(channels, channels, kernel=1))
