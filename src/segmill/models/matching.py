"""Bipartite matching of predicted masks to the classes of a label: costs, then pairs.

Costs are made for every class, present or not, so that no size depends on the data and all layers
and images travel to the CPU together. Follows MMDetection 3.3 `HungarianAssigner` and its costs.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from segmill.data.sample import IGNORE
from segmill.errors import SegmillError

DICE_SMOOTH = 1.0  # added above and below the fraction


class MaskLabel:
    """A label as one mask for each class that occurs; ignored pixels are in no mask.

    The copy of `present` starts here, so that who makes this before the network's forward pass
    finds it arrived afterwards.
    """

    def __init__(self, label: Int[Tensor, "B H W"], num_classes: int) -> None:
        self.classes = torch.where(label == IGNORE, num_classes, label)  # num_classes: no class
        seen = label.new_zeros(len(label), num_classes + 1, dtype=torch.bool)
        self.present: Bool[Tensor, "B K"] = seen.scatter_(1, self.classes.flatten(1), True)[:, :-1]
        self._arriving = self.present.sum(1).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if label.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def counts(self) -> list[int]:
        """How many classes each image has."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._arriving.tolist()


class Pairs(NamedTuple):
    """N matched pairs: image by image, inside of an image in the order of the queries."""

    image: Int[Tensor, " N"]
    query: Int[Tensor, " N"]
    label: Int[Tensor, " N"]


def match(cost: Float[Tensor, "L B Q K"], present: Bool[Tensor, "B K"]) -> list[Pairs]:
    """The cheapest pairs of a query and a present class, for each of L layers.

    The one place of a training step where the device is waited for.
    """
    absent = ~present[None, :, None]
    layers = cost.detach().masked_fill(absent, torch.inf).cpu().numpy()
    if np.isnan(layers).any():
        raise SegmillError(
            "A cost of matching masks to classes is not a number: the network's output is not "
            "either. The training diverged; a lower optim.lr or gradient clipping may help."
        )
    pairs = np.stack([np.concatenate(_pairs(images), axis=1) for images in layers])
    return [Pairs(*layer) for layer in torch.from_numpy(pairs).to(cost.device)]


def _pairs(images: Float[np.ndarray, "B Q K"]) -> list[Int[np.ndarray, "3 _n"]]:
    """(image, query, class) of one layer, for each image; `linear_sum_assignment` sorts rows."""
    found = []
    for index, cost in enumerate(images):
        classes = np.flatnonzero(~np.isposinf(cost[0]))
        query, column = linear_sum_assignment(cost[:, classes])
        found.append(np.stack([np.full_like(query, index), query, classes[column]]))
    return found


def class_cost(class_logits: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q K"]:
    """Minus the probability of each class; the last of the C = K + 1 is "no object"."""
    return -class_logits.softmax(-1)[..., :-1]


def cross_entropy_cost(
    logits: Float[Tensor, "B Q P"], target: Float[Tensor, "B K P"]
) -> Float[Tensor, "B Q K"]:
    """Binary cross-entropy, averaged over the points: softplus(x) - target * x."""
    points = logits.shape[-1]
    return (F.softplus(logits).sum(-1, keepdim=True) - logits @ target.mT) / points


def focal_cost(
    logits: Float[Tensor, "B Q P"], target: Float[Tensor, "B K P"], *, alpha: float, gamma: float
) -> Float[Tensor, "B Q K"]:
    """Focal loss, averaged over the points."""
    prob, eps = logits.sigmoid(), 1e-12  # the original's
    inside = -alpha * (prob + eps).log() * (1 - prob).pow(gamma)
    outside = -(1 - alpha) * (1 - prob + eps).log() * prob.pow(gamma)
    return ((inside - outside) @ target.mT + outside.sum(-1, keepdim=True)) / logits.shape[-1]


def dice_cost(
    logits: Float[Tensor, "B Q P"], target: Float[Tensor, "B K P"]
) -> Float[Tensor, "B Q K"]:
    """One minus twice the overlap over the sum of both areas."""
    prob = logits.sigmoid()
    areas = prob.sum(-1)[:, :, None] + target.sum(-1)[:, None]
    return 1 - (2 * prob @ target.mT + DICE_SMOOTH) / (areas + DICE_SMOOTH)
