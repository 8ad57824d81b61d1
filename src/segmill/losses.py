"""Losses of segmentation heads, as functions of logits and label at one resolution.

Follows MMSegmentation 1.2.2: which pixels count and what the sum is divided by differ from loss to
loss; each docstring says so. Plain cross-entropy is `ops.upsample_cross_entropy`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Logits = Float[Tensor, "B K H W"]
Label = Int[Tensor, "B H W"]


def binary_cross_entropy(
    logits: Logits, label: Label, *, ignore_index: int = 255, average: Literal["all", "valid"]
) -> Float[Tensor, ""]:
    """Each class against the rest, by sigmoid. The mean is over pixels and classes."""
    valid = (label != ignore_index).unsqueeze(1)
    target = _one_hot(label, logits.shape[1], ignore_index)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * valid
    if average == "all":
        return loss.mean()
    return loss.sum() / (valid.sum() * logits.shape[1]).clamp(min=1)


def focal(
    logits: Logits, label: Label, *, gamma: float, alpha: float, ignore_index: int = 255
) -> Float[Tensor, ""]:
    """Sigmoid focal loss, Lin et al. 2017. Ignored pixels add 0 but count in the mean."""
    valid = (label != ignore_index).unsqueeze(1)
    target = _one_hot(label, logits.shape[1], ignore_index)
    prob = logits.sigmoid()
    miss = torch.where(target > 0, 1 - prob, prob)
    balance = torch.where(target > 0, alpha, 1 - alpha)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (balance * miss.pow(gamma) * loss * valid).mean()


def dice(
    logits: Logits,
    label: Label,
    *,
    ignore_index: int = 255,
    eps: float = 1e-3,
    denominator: Literal["squared", "plain"] = "squared",
) -> Float[Tensor, ""]:
    """1 - Dice of the sigmoid map against the one-hot label, all classes of an image as one set.

    Ignored pixels have an empty target but their probability counts, as in the original.
    `squared` sums the squares (V-Net), `plain` the values themselves.
    """
    prob = logits.sigmoid().flatten(1)
    target = _one_hot(label, logits.shape[1], ignore_index).flatten(1)
    overlap = 2 * (prob * target).sum(1)
    if denominator == "plain":
        score = (overlap + eps) / (prob.sum(1) + target.sum(1) + eps)
    else:
        score = overlap / (prob.square().sum(1) + target.sum(1) + 2 * eps)
    return (1 - score).mean()


def tversky(
    logits: Logits,
    label: Label,
    *,
    alpha: float,
    beta: float,
    smooth: float = 1.0,
    ignore_index: int = 255,
) -> Float[Tensor, ""]:
    """1 - Tversky index (Salehi et al. 2017) per image and class, averaged.

    `alpha` weighs false positives, `beta` false negatives.
    """
    valid = (label != ignore_index).unsqueeze(1)
    target = _one_hot(label, logits.shape[1], ignore_index)
    prob = logits.softmax(1) * valid
    hit = (prob * target).sum((2, 3))
    false_positive, false_negative = prob.sum((2, 3)) - hit, target.sum((2, 3)) - hit
    index = (hit + smooth) / (hit + alpha * false_positive + beta * false_negative + smooth)
    return (1 - index).mean()


def lovasz_softmax(
    logits: Logits, label: Label, *, per_image: bool, ignore_index: int = 255
) -> Float[Tensor, ""]:
    """Lovasz extension of the Jaccard loss (Berman et al. 2018) over the classes that occur."""
    prob = logits.softmax(1).movedim(1, -1)
    if not per_image:
        return _lovasz(prob.flatten(0, 2), label.flatten(), ignore_index)
    pairs = zip(prob.flatten(1, 2), label.flatten(1), strict=True)
    return torch.stack([_lovasz(p, y, ignore_index) for p, y in pairs]).mean()


def _lovasz(
    prob: Float[Tensor, "N K"], label: Int[Tensor, " N"], ignore_index: int
) -> Float[Tensor, ""]:
    valid = label != ignore_index
    prob, label = prob[valid], label[valid]
    if not len(label):
        return prob.sum()
    target = F.one_hot(label, prob.shape[1])
    errors, order = (target - prob).abs().sort(0, descending=True)
    target = target.gather(0, order)
    count = target.sum(0)
    intersection = count - target.cumsum(0)
    union = count + (1 - target).cumsum(0)
    jaccard = 1 - intersection / union
    steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    return (errors * steps).sum(0)[count > 0].mean()


def ohem_cross_entropy(
    logits: Logits, label: Label, *, threshold: float, min_kept: int, ignore_index: int = 255
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the hard pixels of the batch only (PIDNet's form).

    Hard: the true class has a probability below `threshold`, or below that of the pixel at rank
    `min_kept` where fewer are.
    """
    loss = _pixel_cross_entropy(logits, label, ignore_index)
    hard = _hard_pixels(loss, label != ignore_index, threshold, min_kept)
    return (loss * hard).sum() / hard.sum().clamp(min=1)


def ohem_by_threshold(
    logits: Logits, label: Label, *, threshold: float, min_kept: int, ignore_index: int = 255
) -> Float[Tensor, ""]:
    """Cross-entropy of the hard pixels divided by ALL pixels (MMSegmentation's OHEM sampler).

    As `ohem_cross_entropy`, `min_kept` being per image: the batch keeps at least B x `min_kept`.
    """
    loss = _pixel_cross_entropy(logits, label, ignore_index)
    hard = _hard_pixels(loss, label != ignore_index, threshold, min_kept * len(label))
    return (loss * hard).mean()


def ohem_by_rank(
    logits: Logits, label: Label, *, kept: int, ignore_index: int = 255
) -> Float[Tensor, ""]:
    """Sum of the B x `kept` largest cross-entropies of the batch, divided by ALL pixels."""
    loss = _pixel_cross_entropy(logits, label, ignore_index)
    count = min(kept * len(label), loss.numel())
    return loss.flatten().topk(count).values.sum() / loss.numel()


def _pixel_cross_entropy(logits: Logits, label: Label, ignore_index: int) -> Float[Tensor, "B H W"]:
    return F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")


def _hard_pixels(
    loss: Float[Tensor, "B H W"], valid: Bool[Tensor, "B H W"], threshold: float, min_kept: int
) -> Bool[Tensor, "B H W"]:
    prob = (-loss.detach()).exp()
    ranked = prob[valid].sort().values
    if not len(ranked):
        return valid
    limit = ranked[min(min_kept, len(ranked) - 1)].clamp(min=threshold)
    return valid & (prob < limit)


def _one_hot(label: Label, num_classes: int, ignore_index: int) -> Float[Tensor, "B K H W"]:
    """One plane a class; all zero where the label is ignored."""
    classes = torch.arange(num_classes, device=label.device)[:, None, None]
    return ((label.unsqueeze(1) == classes) & (label != ignore_index).unsqueeze(1)).float()
