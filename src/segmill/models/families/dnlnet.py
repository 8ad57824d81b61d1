"""DNLNet: a non-local block in two terms, one for each pair of positions, one for each position.

Paper:   Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020,
         https://arxiv.org/abs/2006.06668
Follows: MMSegmentation 1.2.2 `DNLHead`, align_corners=False. Its gradients are of the same
         formula out of place: as shipped it cannot be trained, because it overwrites what the
         backward pass needs (open-mmlab/mmsegmentation#3073).
Weights: MMSegmentation's dnl_* files load through the backbone's key rules.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import classifier
from segmill.models.non_local import (
    convolutions_around_a_block,
    hidden_around,
    map_attention,
    projection,
    residual_projection,
)


class DNLHead(nn.Module):
    """Two convolutions with a disentangled non-local block between them, classifier.

    The block works in channels / reduction; `use_scale` divides its products by the root of that
    number, and `temperature` divides them again.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        reduction: int,
        use_scale: bool,
        temperature: float,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.convs, self.conv_cat = convolutions_around_a_block(in_channels[in_index], channels)
        self.dnl_block = DisentangledNonLocal2d(
            channels, channels // reduction, use_scale=use_scale, temperature=temperature
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        return hidden_around(self.dnl_block, self.convs, self.conv_cat, features[self.in_index])

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


class DisentangledNonLocal2d(nn.Module):
    """x + projected (pairwise + unary) context. It starts as the identity.

    Pairwise: attention between embeddings without their mean over the map. Unary: one average for
    all positions, weighted by how much each position stands out by itself.
    """

    def __init__(
        self, channels: int, inner_channels: int, *, use_scale: bool, temperature: float
    ) -> None:
        super().__init__()
        self.scale = (inner_channels**-0.5 if use_scale else 1.0) / temperature
        self.g = projection(channels, inner_channels)
        self.theta = projection(channels, inner_channels)
        self.phi = projection(channels, inner_channels)
        self.conv_out = residual_projection(inner_channels, channels)
        self.conv_mask = nn.Conv2d(channels, 1, 1)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        query, key = _without_mean(self.theta(feature)), _without_mean(self.phi(feature))
        value = self.g(feature)
        pairwise = map_attention(query, key, value, scale=self.scale)
        mask = self.conv_mask(feature).flatten(2).softmax(dim=2)
        unary = (value.flatten(2) @ mask.transpose(1, 2)).unsqueeze(3)
        return feature + self.conv_out(pairwise + unary)


def _without_mean(feature: Float[Tensor, "B E h w"]) -> Float[Tensor, "B E h w"]:
    return feature - feature.mean(dim=(2, 3), keepdim=True)
