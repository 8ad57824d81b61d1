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
    """Attention on a shrunken map ("collect", "distribute" or both), its input beside it, classifier.

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
        """The feature averaged (summed, without a softmax) with the scores it predicts."""
        if self.compact:
            pairs = iter([scores(feature).flatten(2)])
        else:
            pairs = scores.of_pairs(feature, direction)
        context = weighted_sums(feature, pairs, direction, softmax=self.psa_softmax)
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
    ) -> Iterator[Float[Tensor, "B _other _own"]]:
        """The score of every position (last axis) for every other one, 0 outside the window.

        Comes in parts: of the last axis for "collect", of the other one for "distribute".
        """
        size, window = feature.shape[-2:], self.window
        (top, rows), (left, columns) = map(in_reach, size, window)
        weight = self.get_parameter("1.weight").unflatten(0, window)
        weight = weight[top : top + rows, left : left + columns].flatten(0, 1)
        weight = F.pad(weight, (0, 0) * 3 + (0, 1))  # the last score, of all that is outside, is 0
        scores = F.conv2d(self[0](feature), weight).flatten(2)

        height, width = size
        index_y = offset_index(height, window[0], columns, rows * columns, feature.device)
        index_x = offset_index(width, window[1], 1, rows * columns, feature.device)
        step = max(1, PAIRS_AT_ONCE // (len(feature) * height * width**2))
        for start in range(0, height, step):
            part = slice(start, start + step)
            if direction == "collect":
                own = scores[..., start * width : (start + step) * width]
                yield _gather(own, index_y[:, part], index_x)
            else:
                yield _gather(scores, index_y[part], index_x)


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


def _gather(
    scores: Float[Tensor, "B S i"], index_y: Int64[Tensor, "_jy _iy"], index_x: Int64[Tensor, "w w"]
) -> Float[Tensor, "B _j i"]:
    """Scores by (j, i) from scores by (offset, i); the last offset stands for any outside."""
    index = index_y[:, None, :, None] + index_x[None, :, None, :]
    index = index.flatten(2).flatten(0, 1).clamp(max=scores.shape[1] - 1)
    return scores.gather(1, index.expand(len(scores), -1, -1))


def weighted_sums(
    feature: Float[Tensor, "B D h w"],
    pairs: Iterable[Float[Tensor, "B _other _own"]],
    direction: Direction,
    *,
    softmax: bool,
) -> Float[Tensor, "B D h w"]:
    """A position sums the feature by its own scores ("collect") or by those for it."""
    values, sums = feature.flatten(2), []
    for part in pairs:
        if direction == "collect":
            sums.append(values @ (part.softmax(dim=1) if softmax else part))
        else:
            sums.append(values @ (part.softmax(dim=2) if softmax else part).transpose(1, 2))
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
