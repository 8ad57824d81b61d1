"""PointRend: a coarse segmentation is doubled, and classified anew where it is least certain.

Paper:   Kirillov et al., "PointRend: Image Segmentation as Rendering", CVPR 2020,
         https://arxiv.org/abs/1912.08193
Follows: MMSegmentation 1.2.2 `PointHead` behind Semantic FPN in a `CascadeEncoderDecoder`,
         align_corners=False, with its draws of training points.
Weights: MMSegmentation's pointrend_* files load through the backbone's key rules.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.layers import Backbone, Part, cross_entropy, move_statistics_twice


class PointRend(nn.Module):
    """`coarse_head` segments; `decode_head` refines that, and the result is the network's.

    They are `decode_head.0` and `decode_head.1`, as in MMSegmentation. `class_weight` has one
    factor for each class.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: Part,
        coarse_head: Part,
        decode_head: Part,
        class_weight: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck: nn.Module = neck(in_channels=backbone.channels)
        coarse = move_statistics_twice(coarse_head(in_channels=self.neck.channels))
        self.decode_head = nn.ModuleList([coarse, decode_head(in_channels=self.neck.channels)])
        self.class_weight = class_weight

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K _h _w"]:
        features = self.neck(self.backbone(image))
        coarse_head, head = self._heads()
        return head.refine(features, coarse_head(features))

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """`decode_0.*` and `decode_1.*`: MMSegmentation's names."""
        features = self.neck(self.backbone(image))
        coarse_head, head = self._heads()
        coarse = coarse_head(features)
        return {
            "decode_0.loss_ce": cross_entropy(coarse, label, self.class_weight),
            "decode_1.pointloss_ce": head.loss(features, coarse, label, self.class_weight),
        }

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Those of the backbone; neck and heads have their weights by name."""
        return self.backbone.key_rules()

    def _heads(self) -> tuple[nn.Module, "PointHead"]:
        coarse_head, head = self.decode_head
        assert isinstance(head, PointHead)
        return coarse_head, head


class PointHead(nn.Module):
    """Classifies single points from the features and the coarse logits that are there.

    Training: `training_points`, of which `uncertain_share` are the least certain of `oversampling`
    times as many random ones, the others random. Inference: `subdivision_points` of the least
    certain pixels in each of `subdivisions` doublings.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: Sequence[int],
        channels: int,
        num_layers: int,
        training_points: int,
        oversampling: int,
        uncertain_share: float,
        subdivisions: int,
        subdivision_points: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = in_index
        self.candidates = training_points * oversampling
        self.uncertain = int(training_points * uncertain_share)
        self.random = training_points - self.uncertain
        self.subdivisions, self.subdivision_points = subdivisions, subdivision_points
        sizes = [sum(in_channels[index] for index in in_index)] + [channels] * num_layers
        # Every layer sees the coarse logits again.
        self.fcs = nn.ModuleList(PointLayer(a + num_classes, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.fc_seg = nn.Conv1d(channels + num_classes, num_classes, 1)
        nn.init.normal_(self.fc_seg.weight, std=0.01)
        nn.init.zeros_(self.fc_seg.bias)  # type: ignore[arg-type]  # it has one by default

    def forward(
        self,
        features: Sequence[Float[Tensor, "B _D _h _w"]],
        coarse: Float[Tensor, "B K h w"],
        points: Float[Tensor, "B P 2"],
    ) -> Float[Tensor, "B K P"]:
        guess = sample(coarse, points)
        hidden = torch.cat([sample(features[index], points) for index in self.in_index], dim=1)
        for layer in self.fcs:
            hidden = layer(torch.cat([hidden, guess], dim=1))
        return self.fc_seg(self.dropout(torch.cat([hidden, guess], dim=1)))

    def refine(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], coarse: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B K _h _w"]:
        """The coarse logits, doubled again and again, with new ones where they are uncertain."""
        logits = coarse
        for _ in range(self.subdivisions):
            logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
            pixels, points = self._uncertain_pixels(logits)
            new = self(features, coarse, points).to(logits)
            where = pixels.unsqueeze(1).expand_as(new)
            logits = logits.flatten(2).scatter_(2, where, new).view_as(logits)
        return logits

    def loss(
        self,
        features: Sequence[Float[Tensor, "B _D _h _w"]],
        coarse: Float[Tensor, "B K h w"],
        label: Integer[Tensor, "B H W"],
        class_weight: Sequence[float] | None,
    ) -> Float[Tensor, ""]:
        """Cross-entropy at points, the mean over all of them, ignored ones included."""
        points = self.draw_points(coarse)
        logits = self(features, coarse, points)
        at_points = sample(label.unsqueeze(1).float(), points, mode="nearest").long()
        return cross_entropy(logits.unsqueeze(3), at_points.transpose(1, 2), class_weight)

    @torch.no_grad()
    def draw_points(self, coarse: Float[Tensor, "B K h w"]) -> Float[Tensor, "B P 2"]:
        """Training points (x, y) in 0..1."""
        batch = len(coarse)
        candidates = torch.rand(batch, self.candidates, 2, device=coarse.device)
        # Sampled first, compared then: between two certain pixels there is an uncertain point.
        chosen = uncertainty(sample(coarse, candidates)).topk(self.uncertain, dim=1).indices
        uncertain = candidates.gather(1, chosen.unsqueeze(2).expand(-1, -1, 2))
        random = torch.rand(batch, self.random, 2, device=coarse.device)
        return torch.cat([uncertain, random], dim=1)

    @torch.no_grad()
    def _uncertain_pixels(
        self, logits: Float[Tensor, "B K h w"]
    ) -> tuple[Int[Tensor, "B P"], Float[Tensor, "B P 2"]]:
        """Their places in the flattened map, and their centres (x, y) in 0..1."""
        height, width = logits.shape[-2:]
        count = min(height * width, self.subdivision_points)
        pixels = uncertainty(logits.flatten(2)).topk(count, dim=1).indices
        x, y = (pixels % width + 0.5) / width, (pixels // width + 0.5) / height
        return pixels, torch.stack([x, y], dim=2)


class PointLayer(nn.Sequential):
    """A fully connected layer on each point."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, 1)
        self.activate = nn.ReLU()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # it has one by default


def uncertainty(logits: Float[Tensor, "B K P"]) -> Float[Tensor, "B P"]:
    """Minus the lead of the likeliest class over the second."""
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return second - first


def sample(
    feature: Float[Tensor, "B D h w"], points: Float[Tensor, "B P 2"], mode: str = "bilinear"
) -> Float[Tensor, "B D P"]:
    """The map's values at points (x, y), 0 and 1 being its outer edges; zeros lie beyond."""
    grid = 2 * points.unsqueeze(2) - 1
    return F.grid_sample(feature, grid, mode=mode, align_corners=False).squeeze(3)
