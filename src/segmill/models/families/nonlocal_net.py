"""Non-local: every position of the last map adds an average over all others like it.

Paper:   Wang et al., "Non-local Neural Networks", CVPR 2018, https://arxiv.org/abs/1711.07971
Follows: MMSegmentation 1.2.2 `NLHead` with mmcv's `NonLocal2d`, align_corners=False.
Weights: MMSegmentation's nonlocal_* files load through the backbone's key rules.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.models.layers import classifier
from segmill.models.non_local import (
    convolutions_around_a_block,
    hidden_around,
    map_attention,
    projection,
    residual_projection,
)


class NLHead(nn.Module):
    """Two convolutions with a non-local block between them, classifier.

    The block works in channels / reduction. `use_scale` divides its products by the root of that
    number, as a softmax wants it: only "embedded_gaussian" has one.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        reduction: int,
        mode: Literal["embedded_gaussian", "dot_product"],
        use_scale: bool,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.convs, self.conv_cat = convolutions_around_a_block(in_channels[in_index], channels)
        self.nl_block = NonLocal2d(channels, channels // reduction, mode=mode, use_scale=use_scale)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        return hidden_around(self.nl_block, self.convs, self.conv_cat, features[self.in_index])

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


class NonLocal2d(nn.Module):
    """x + projected average over all positions, weighted by a product of embeddings.

    The weights are a softmax ("embedded_gaussian") or the products over the number of positions
    ("dot_product"). It starts as the identity.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        *,
        mode: Literal["embedded_gaussian", "dot_product"],
        use_scale: bool,
    ) -> None:
        super().__init__()
        if mode == "dot_product" and use_scale:
            raise SegmillError(
                "use_scale scales a softmax, and mode dot_product has none. Set use_scale to false."
            )
        self.mode = mode
        self.scale = inner_channels**-0.5 if use_scale else 1.0
        self.g = projection(channels, inner_channels)
        self.theta = projection(channels, inner_channels)
        self.phi = projection(channels, inner_channels)
        self.conv_out = residual_projection(inner_channels, channels)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        query, key, value = self.theta(feature), self.phi(feature), self.g(feature)
        if self.mode == "dot_product":
            context = _dot_product(query, key, value)
        else:
            context = map_attention(query, key, value, scale=self.scale)
        return feature + self.conv_out(context)


def _dot_product(
    query: Float[Tensor, "B E h w"], key: Float[Tensor, "B E h w"], value: Float[Tensor, "B E h w"]
) -> Float[Tensor, "B E h w"]:
    """Without a softmax the product is associative: no matrix over pairs of positions."""
    key, value = key.flatten(2), value.flatten(2)
    mixing = value @ key.transpose(1, 2) / key.shape[-1]
    return torch.matmul(mixing, query.flatten(2)).unflatten(2, query.shape[-2:])
