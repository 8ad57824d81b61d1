"""STDC: a fully convolutional head on fused features; in training, a head that finds boundaries.

Paper:   Fan et al., "Rethinking BiSeNet For Real-time Semantic Segmentation", CVPR 2021,
         https://arxiv.org/abs/2104.13188
Follows: MMSegmentation 1.2.2 `stdc*` on Cityscapes: logits upsampled with align_corners=True, those
         of the two auxiliary `FCNHead` with False; their cross-entropy is of hard pixels
         (`OHEMPixelSampler`), `STDCHead` has binary cross-entropy and Dice.
Weights: MMSegmentation's stdc* files load by name.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.losses import binary_cross_entropy, dice, ohem_by_threshold
from segmill.models.layers import Backbone, ConvBNAct, HasLosses, Part, classifier, resize

BOUNDARY_CLASSES = 2  # inside, boundary


class STDC(nn.Module):
    """Logits of the decode head at the image's size; auxiliary heads only add losses.

    Heads without losses of their own have the cross-entropy of the pixels whose true class has a
    probability below `threshold`, of `min_kept` an image at least.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        decode_head: Part,
        auxiliary_head: Sequence[Part],
        threshold: float,
        min_kept: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head: nn.Module = decode_head(in_channels=backbone.channels)
        heads = (head(in_channels=backbone.channels) for head in auxiliary_head)
        self.auxiliary_head = nn.ModuleList(heads)
        self.threshold, self.min_kept = threshold, min_kept

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        return _resize_by_corners(self.decode_head(self.backbone(image)), image.shape[-2:])

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """`decode.*`, `aux_0.*`, ...: MMSegmentation's names."""
        features, label = self.backbone(image), label.long()
        logits = _resize_by_corners(self.decode_head(features), label.shape[-2:])
        terms = {"decode.loss_ce": self._hard_cross_entropy(logits, label)}
        for index, head in enumerate(self.auxiliary_head):
            if isinstance(head, HasLosses):
                own = head.losses(features, label)
            else:
                logits = resize(head(features), label.shape[-2:])
                own = {"loss_ce": self._hard_cross_entropy(logits, label)}
            terms |= {f"aux_{index}.{name}": term for name, term in own.items()}
        return terms

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Those of the backbone; the heads have their weights by name."""
        return self.backbone.key_rules()

    def _hard_cross_entropy(
        self, logits: Float[Tensor, "B K H W"], label: Int[Tensor, "B H W"]
    ) -> Float[Tensor, ""]:
        return ohem_by_threshold(logits, label, threshold=self.threshold, min_kept=self.min_kept)


class STDCHead(nn.Module):
    """Tells boundaries between classes from their inside, on one feature map.

    A boundary is where a Laplacian of the label, at stride 1, 2 and 4, mixed by `fusion_kernel`,
    exceeds `boundary_threshold`. Neither kernel learns, but files have them.
    """

    laplacian_kernel: Float[Tensor, "1 1 3 3"]

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        dropout: float,
        boundary_threshold: float,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.boundary_threshold = boundary_threshold
        self.convs = nn.Sequential(ConvBNAct(in_channels[in_index], channels, kernel=3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, BOUNDARY_CLASSES)
        laplacian = torch.full((1, 1, 3, 3), -1.0)
        laplacian[..., 1, 1] = 8.0
        self.register_buffer("laplacian_kernel", laplacian)
        fusion = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1)
        self.fusion_kernel = nn.Parameter(fusion, requires_grad=False)

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B 2 _k _l"]:
        return self.conv_seg(self.dropout(self.convs(features[self.in_index])))

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Binary cross-entropy and Dice, at the label's size."""
        logits = _resize_by_corners(self(features), label.shape[-2:])
        boundary = self.boundary(label)
        return {
            "loss_ce": binary_cross_entropy(logits, boundary, average="all"),
            "loss_dice": dice(logits, boundary),
        }

    @torch.no_grad()
    def boundary(self, label: Integer[Tensor, "B H W"]) -> Int[Tensor, "B H W"]:
        """1 on boundaries, else 0. The edges of what is ignored are boundaries as any other."""
        with torch.autocast(label.device.type, enabled=False):  # half floats would round 0.1 up
            classes = label.unsqueeze(1).to(self.laplacian_kernel)
            edges = [
                F.interpolate(
                    F.conv2d(classes, self.laplacian_kernel, stride=stride, padding=1),
                    label.shape[-2:],
                    mode="nearest",
                )
                > self.boundary_threshold
                for stride in (1, 2, 4)
            ]
            mixed = F.conv2d(torch.cat(edges, dim=1).to(classes), self.fusion_kernel)
        return (mixed.squeeze(1) > self.boundary_threshold).long()


def _resize_by_corners(
    logits: Float[Tensor, "B K h w"], size: Sequence[int]
) -> Float[Tensor, "B K H W"]:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)
