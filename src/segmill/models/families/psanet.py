"""PSANet: every position predicts how much it takes from, and gives to, each position around it.

Paper:   Zhao et al., "PSANet: Point-wise Spatial Attention Network for Scene Parsing", ECCV 2018,
         https://hszhao.github.io/papers/eccv18_psanet.pdf
Follows: MMSegmentation 1.2.2 `PSAHead`, align_corners=False, without mmcv's compiled `PSAMask`.
Weights: MMSegmentation's psanet_* files load through the backbone's key rules.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct, classifier

# A matrix over pairs of positions grows with the fourth power of the image's side. Above this many
# pairs in a batch it is made and used in parts; a batch of 16 crops of 512 x 512 is one part.
PAIRS_AT_ONCE = 2**24

Direction = Literal["collect", "distribute"]


class PSAHead(nn.Module):
    """Attention on a shrunken map ("collect", "distribute", or both), the map, classifier.

    `mask_size` is the (height, width) of the window of offsets that a position scores; what lies
    outside of it has score 0. In a `compact` head the scores are of absolute positions instead, so
    that mask_size is the size of the shrunken map and only images of one size fit.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        mask_size: tuple[int, int],
        psa_type: Literal["collect", "distribute", "bi-direction"],
        compact: bool,
        shrink_factor: int,
        normalization_factor: float,
        psa_softmax: bool,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index, self.psa_type, self.compact = in_index, psa_type, compact
        self.shrink_factor, self.psa_softmax = shrink_factor, psa_softmax
        self.normalization_factor = normalization_factor
        width = in_channels[in_index]
        self.reduce = ConvBNAct(width, channels, kernel=1)
        self.attention = Scores(channels, mask_size)
        if psa_type == "bi-direction":
            self.reduce_p = ConvBNAct(width, channels, kernel=1)
            self.attention_p = Scores(channels, mask_size)
        self.proj = ConvBNAct(len(self.branches()) * channels, width, kernel=1)
        self.bottleneck = ConvBNAct(2 * width, channels, kernel=3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D _k _l"]:
        """What is classified."""
        feature = features[self.in_index]
        size, align_corners = shrunken(feature.shape[-2:], self.shrink_factor)
        contexts = [
            self.attended(direction, _resize(reduce(feature), size, align_corners), scores)
            for direction, reduce, scores in self.branches()
        ]
        # The original pads this 1 x 1 convolution, so that its map has a border.
        context = self.proj(F.pad(torch.cat(contexts, dim=1), (1, 1, 1, 1)))
        context = _resize(context, feature.shape[-2:], align_corners)
        return self.bottleneck(torch.cat([feature, context], dim=1))

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.conv_seg(self.dropout(self.hidden(features)))

    def branches(self) -> list[tuple[Direction, nn.Module, "Scores"]]:
        """Direction, reduction and scores of each attention."""
        if self.psa_type == "bi-direction":
            return [
                ("collect", self.reduce, self.attention),
                ("distribute", self.reduce_p, self.attention_p),
            ]
        # A compact head of one direction: the original exchanges them, unlike in one of both.
        collects = (self.psa_type == "collect") != self.compact
        return [("collect" if collects else "distribute", self.reduce, self.attention)]

    def attended(
        self, direction: Direction, feature: Float[Tensor, "B D h w"], scores: "Scores"
    ) -> Float[Tensor, "B D h w"]:
        """Each position's sum of the feature by the scores that `feature` predicts."""
        if not self.compact:
            parts = scores.of_pairs(feature, direction)
        elif direction == "collect":
            parts = iter([scores(feature).flatten(2).transpose(1, 2)])
        else:
            parts = iter([scores(feature).flatten(2)])
        context = weighted_sums(feature, parts, softmax=self.psa_softmax)
        return context * (1.0 / self.normalization_factor)


class Scores(nn.Sequential):
    """What a position's own feature says about each offset (row by row) in a window around it.

    The window's centre is (size - 1) // 2. The last layer has no bias, so a row of zeros in its
    weight is a score of 0.
    """

    def __init__(self, channels: int, window: tuple[int, int]) -> None:
        super().__init__(
            ConvBNAct(channels, channels, kernel=1),
            nn.Conv2d(channels, window[0] * window[1], 1, bias=False),
        )
        self.window = window

    def of_pairs(
        self, feature: Float[Tensor, "B D h w"], direction: Direction
    ) -> Iterator[Float[Tensor, "B _to _from"]]:
        """How much each position (by parts, whole rows of the map) receives from every other one.

        In "collect" the receiver predicts it, in "distribute" the giver; 0 outside the window.
        """
        (height, width), window = feature.shape[-2:], self.window
        weight, outside = self._weight_in_reach(height, width)
        tokens = self[0](feature).flatten(2)
        _, columns = in_reach(width, window[1])
        index_y = offset_index(height, window[0], columns, outside, feature.device)
        index_x = offset_index(width, window[1], 1, outside, feature.device)

        # Either way in memory: neighbours in the last axis of what is gathered are close.
        if direction == "collect":
            scores, axis = tokens.transpose(1, 2) @ weight.T, 2
            index_y, index_x = index_y.T.contiguous(), index_x.T.contiguous()
        else:
            scores, axis = weight @ tokens, 1
        rows = max(1, PAIRS_AT_ONCE // (len(feature) * height * width**2))
        for start in range(0, height, rows):
            index = index_y[start : start + rows, None, :, None] + index_x[:, None, :]
            index = index.flatten(2).flatten(0, 1).clamp_(max=outside)
            own = scores[:, start * width : (start + rows) * width] if axis == 2 else scores
            yield own.gather(axis, index.expand(len(feature), -1, -1))

    def _weight_in_reach(self, height: int, width: int) -> tuple[Float[Tensor, "S D"], int]:
        """The last layer's rows for offsets within the map and, after them, zeros: its index."""
        (top, rows), (left, columns) = map(in_reach, (height, width), self.window)
        last = self[1]
        assert isinstance(last, nn.Conv2d)
        weight = last.weight.flatten(1).unflatten(0, self.window)
        weight = weight[top : top + rows, left : left + columns].flatten(0, 1)
        return F.pad(weight, (0, 0, 0, 1)), rows * columns


def in_reach(size: int, window: int) -> tuple[int, int]:
    """Start and number of the window's entries that reach from some position to another one."""
    centre = (window - 1) // 2
    start, stop = max(0, centre - size + 1), min(window, centre + size)
    return start, stop - start


def offset_index(
    size: int, window: int, factor: int, outside: int, device: torch.device
) -> Int64[Tensor, "j i"]:
    """[j, i]: `factor` x the entry of offset j - i among those in reach, or `outside`."""
    start, count = in_reach(size, window)
    positions = torch.arange(size, device=device)
    entry = positions[:, None] - positions + (window - 1) // 2 - start
    return torch.where((entry >= 0) & (entry < count), entry * factor, outside)


def weighted_sums(
    feature: Float[Tensor, "B D h w"],
    parts: Iterable[Float[Tensor, "B _to _from"]],
    *,
    softmax: bool,
) -> Float[Tensor, "B D h w"]:
    """What each position receives, with or without a softmax over all that give."""
    values = feature.flatten(2)
    sums = [values @ (p.softmax(dim=2) if softmax else p).transpose(1, 2) for p in parts]
    return torch.cat(sums, dim=2).unflatten(2, feature.shape[-2:])


def shrunken(size: Sequence[int], factor: int) -> tuple[list[int], bool]:
    """Size of the attention's map, and whether the original aligns corners on the way and back."""
    height, width = size
    if factor > 1 and height % factor and width % factor:
        return [(height - 1) // factor + 1, (width - 1) // factor + 1], True
    return [height // factor, width // factor], False


def _resize(
    feature: Float[Tensor, "B D _h _w"], size: Sequence[int], align_corners: bool
) -> Float[Tensor, "B D _k _l"]:
    return F.interpolate(feature, tuple(size), mode="bilinear", align_corners=align_corners)
