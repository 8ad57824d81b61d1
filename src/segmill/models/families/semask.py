"""SeMask: a feature pyramid head, and the sum of the class maps as a second output in training.

Paper:   Jain et al., "SeMask: Semantically Masked Transformers for Semantic Segmentation", 2021,
         https://arxiv.org/abs/2112.12782
Follows: the authors' `BranchFPNHead` on `models.backbones.semask_swin`, align_corners=False.
Weights: the authors' semask_*_fpn files through the backbone's key rules; heads by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.models.layers import cross_entropy, resize


class SeMaskHead(nn.Module):
    """The first half of the maps through `head`; the second half are class maps, summed.

    `head` (Semantic FPN's) lends its parts, whose names are then this head's. `prior_weight` is
    that of the class maps' cross-entropy.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        head: Callable[..., Any],
        prior_weight: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.levels = len(in_channels) // 2
        lent = head(in_channels=in_channels[: self.levels], num_classes=num_classes)
        self.scale_heads, self.conv_seg = lent.scale_heads, lent.conv_seg
        self.dropout = lent.dropout
        self.prior_weight = prior_weight

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        pairs = zip(self.scale_heads, features[: self.levels], strict=True)
        finest, *others = (head(feature) for head, feature in pairs)
        hidden = sum((resize(other, finest.shape[-2:]) for other in others), start=finest)
        return self.conv_seg(self.dropout(hidden))

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of the logits, and of the sum of all class maps."""
        finest, *others = features[self.levels :]
        prior = sum((resize(other, finest.shape[-2:]) for other in others), start=finest)
        return {
            "loss_ce": cross_entropy(self(features), label, None),
            "loss_cate": self.prior_weight * cross_entropy(prior, label, None),
        }
