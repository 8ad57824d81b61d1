"""Losses of networks that predict a set of masks, each with a class: match, then compare.

Every decoder layer has its losses, by names of its own. Follows MMDetection 3.3: `MaskFormerHead`
as `DenseMaskLosses`, `Mask2FormerHead` as `PointMaskLosses`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, distributed

from segmill.models.matching import (
    DICE_SMOOTH,
    MaskLabel,
    Pairs,
    class_cost,
    cross_entropy_cost,
    dice_cost,
    focal_cost,
    match,
)


class Prediction(NamedTuple):
    """What one decoder layer says of every query."""

    classes: Float[Tensor, "B Q C"]  # logits; the last class is "no object"
    masks: Float[Tensor, "B Q h w"]  # logits


@dataclass(frozen=True)
class LossWeights:
    """Factors of the three terms, in the cost of matching too.

    `no_object` is the weight of that class beside the others' 1.
    """

    classes: float
    masks: float
    dice: float
    no_object: float


class DenseMaskLosses:
    """Focal and dice loss at all pixels of the label; matching at the masks' own resolution."""

    def __init__(self, *, weights: LossWeights, alpha: float, gamma: float) -> None:
        self.weights, self.alpha, self.gamma = weights, alpha, gamma

    def __call__(
        self, predictions: Sequence[Prediction], label: MaskLabel
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms by name: the last layer's `loss_cls`, ..., the others' as `d0.loss_cls`, ..."""
        with torch.autocast(label.present.device.type, enabled=False):
            predictions = _in_float(predictions)
            target = self._matching_target(predictions[0], label)
            cost = torch.stack([self._cost(each, target) for each in predictions])
            pairs = match(cost, label.present)
            masks = [
                self._mask_losses(prediction.masks, each, label)
                for prediction, each in zip(predictions, pairs, strict=True)
            ]
            return named_terms(predictions, pairs, masks, label, self.weights)

    def _matching_target(self, prediction: Prediction, label: MaskLabel) -> Float[Tensor, "B K P"]:
        size = prediction.masks.shape[-2:]
        coarse = F.interpolate(label.classes[:, None].float(), size, mode="nearest").flatten(2)
        classes = torch.arange(label.present.shape[1], device=coarse.device)
        return (coarse == classes[:, None]).float()

    @torch.no_grad()
    def _cost(
        self, prediction: Prediction, target: Float[Tensor, "B K P"]
    ) -> Float[Tensor, "B Q K"]:
        masks = prediction.masks.flatten(2)
        focal = focal_cost(masks, target, alpha=self.alpha, gamma=self.gamma)
        return total_cost(prediction, focal, dice_cost(masks, target), self.weights)

    def _mask_losses(
        self, masks: Float[Tensor, "B Q h w"], pairs: Pairs, label: MaskLabel
    ) -> "MaskLosses":
        size = label.classes.shape[-2:]
        matched = masks[pairs.image, pairs.query][:, None]
        masks = F.interpolate(matched, size, mode="bilinear", align_corners=False).flatten(1)
        target = (label.classes[pairs.image] == pairs.label[:, None, None]).flatten(1).float()
        prob = masks.sigmoid()
        wrong = (1 - prob) * target + prob * (1 - target)
        balance = self.alpha * target + (1 - self.alpha) * (1 - target)
        entropy = F.binary_cross_entropy_with_logits(masks, target, reduction="none")
        focal = balance * wrong.pow(self.gamma) * entropy
        return MaskLosses(focal.mean(1), dice_loss(masks, target))


class PointMaskLosses:
    """Cross-entropy and dice loss at `num_points` random points of each mask.

    The points of the matching are uniform. Those of the losses: of `oversample` times as many
    uniform ones the share `importance` that is nearest to the mask's border, the rest uniform.
    """

    def __init__(
        self, *, weights: LossWeights, num_points: int, oversample: float, importance: float
    ) -> None:
        self.weights, self.num_points = weights, num_points
        self.candidates = int(num_points * oversample)
        self.uncertain = int(num_points * importance)

    def __call__(
        self, predictions: Sequence[Prediction], label: MaskLabel
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms by name: the last layer's `loss_cls`, ..., the others' as `d0.loss_cls`, ..."""
        with torch.autocast(label.present.device.type, enabled=False):
            predictions = _in_float(predictions)
            queries = predictions[0].masks.shape[1]
            total = sum(min(count, queries) for count in label.counts())
            draws = [self._draw(total, label) for _ in predictions]
            costs = [
                self._cost(prediction, draw.matching, label)
                for prediction, draw in zip(predictions, draws, strict=True)
            ]
            pairs = match(torch.stack(costs), label.present)
            masks = [
                self._mask_losses(prediction.masks, each, draw, label)
                for prediction, each, draw in zip(predictions, pairs, draws, strict=True)
            ]
            return named_terms(predictions, pairs, masks, label, self.weights)

    def _draw(self, total: int, label: MaskLabel) -> "_Draw":
        """All points of one layer, in the original's order."""
        device, rest = label.present.device, self.num_points - self.uncertain
        return _Draw(
            torch.rand(len(label.present), self.num_points, 2, device=device),
            torch.rand(total, self.candidates, 2, device=device),
            torch.rand(total, rest, 2, device=device),
        )

    @torch.no_grad()
    def _cost(
        self, prediction: Prediction, points: Float[Tensor, "B P 2"], label: MaskLabel
    ) -> Float[Tensor, "B Q K"]:
        masks = read_maps(prediction.masks, points)
        classes = torch.arange(label.present.shape[1], device=points.device)
        target = read_classes(label.classes, points, classes.expand(len(points), -1))
        entropy = cross_entropy_cost(masks, target)
        return total_cost(prediction, entropy, dice_cost(masks, target), self.weights)

    def _mask_losses(
        self, masks: Float[Tensor, "B Q h w"], pairs: Pairs, draw: "_Draw", label: MaskLabel
    ) -> "MaskLosses":
        matched = masks[pairs.image, pairs.query][:, None]
        with torch.no_grad():
            doubt = -read_maps(matched, draw.candidates)[:, 0].abs()
            chosen = doubt.topk(self.uncertain, dim=1).indices
            border = draw.candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
            points = torch.cat([border, draw.rest], dim=1)
            labels = label.classes[pairs.image]
            target = read_classes(labels, points, pairs.label[:, None])[:, 0]
        masks = read_maps(matched, points)[:, 0]
        entropy = F.binary_cross_entropy_with_logits(masks, target, reduction="none")
        return MaskLosses(entropy.mean(1), dice_loss(masks, target))


class MaskLosses(NamedTuple):
    """Of each matched mask."""

    pixels: Float[Tensor, " N"]
    dice: Float[Tensor, " N"]


class _Draw(NamedTuple):
    """Random points (x, y) in 0..1: for the matching of B images, for the losses of N masks."""

    matching: Float[Tensor, "B P 2"]
    candidates: Float[Tensor, "N E 2"]
    rest: Float[Tensor, "N R 2"]


def read_maps(
    maps: Float[Tensor, "B D h w"], points: Float[Tensor, "B P 2"]
) -> Float[Tensor, "B D P"]:
    """Bilinear values at (x, y) in 0..1 from edge to edge; outside of the map lie zeros."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps, grid, mode="bilinear", align_corners=False)[..., 0]


def read_classes(
    label: Int[Tensor, "B H W"], points: Float[Tensor, "B P 2"], classes: Int[Tensor, "B K"]
) -> Float[Tensor, "B K P"]:
    """What `read_maps` gives for the mask of each class, without making the masks."""
    height, width = label.shape[1:]
    size = points.new_tensor([width, height])
    position = points * size - 0.5
    corner = position.floor()
    share, flat = position - corner, label.flatten(1)
    values = torch.zeros(())
    for right in (0, 1):
        for down in (0, 1):
            x, y = (corner + corner.new_tensor([right, down])).unbind(-1)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()
            to_x, to_y = share.unbind(-1)
            weight = (to_x if right else 1 - to_x) * (to_y if down else 1 - to_y) * inside
            same = flat.gather(1, index)[:, None] == classes[:, :, None]
            values = values + weight[:, None] * same
    return values


def total_cost(
    prediction: Prediction,
    masks: Float[Tensor, "B Q K"],
    dice: Float[Tensor, "B Q K"],
    weights: LossWeights,
) -> Float[Tensor, "B Q K"]:
    """The weighted sum of the three costs."""
    classes = weights.classes * class_cost(prediction.classes)
    return classes + weights.masks * masks + weights.dice * dice


def dice_loss(masks: Float[Tensor, "N P"], target: Float[Tensor, "N P"]) -> Float[Tensor, " N"]:
    """One minus twice the overlap over the sum of both areas; `masks` are logits."""
    prob = masks.sigmoid()
    areas = prob.sum(1) + target.sum(1)
    return 1 - (2 * (prob * target).sum(1) + DICE_SMOOTH) / (areas + DICE_SMOOTH)


def class_loss(logits: Float[Tensor, "B Q C"], pairs: Pairs, no_object: float) -> Float[Tensor, ""]:
    """Cross-entropy of all queries; those without a pair should say "no object"."""
    batch, queries, classes = logits.shape
    target = pairs.label.new_full((batch, queries), classes - 1)
    target[pairs.image, pairs.query] = pairs.label
    weight = logits.new_ones(classes)
    weight[-1] = no_object
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)


def named_terms(
    predictions: Sequence[Prediction],
    pairs: Sequence[Pairs],
    masks: Sequence[MaskLosses],
    label: MaskLabel,
    weights: LossWeights,
) -> dict[str, Float[Tensor, ""]]:
    """MMDetection's names: the last layer's as they are, the others' after `d0.`, `d1.`, ..."""
    terms, last = {}, len(predictions) - 1
    count = mask_count(label, predictions[0].classes.shape[1])
    for layer, (prediction, each, mask) in enumerate(zip(predictions, pairs, masks, strict=True)):
        prefix = "" if layer == last else f"d{layer}."
        classes = class_loss(prediction.classes, each, weights.no_object)
        terms[f"{prefix}loss_cls"] = weights.classes * classes
        terms[f"{prefix}loss_mask"] = weights.masks * mask.pixels.sum() / count
        terms[f"{prefix}loss_dice"] = weights.dice * mask.dice.sum() / count
    return terms


def mask_count(label: MaskLabel, queries: int) -> Float[Tensor, ""]:
    """How many masks are matched, averaged over the processes.

    An image without any class counts as one mask, as in the original.
    """
    matched = sum(max(min(count, queries), 1) for count in label.counts())
    count = torch.full((), float(matched), device=label.present.device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count /= distributed.get_world_size()
    return count


def _in_float(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [Prediction(each.classes.float(), each.masks.float()) for each in predictions]
