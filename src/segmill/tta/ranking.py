"""Of a classifier's logits: what top-1, top-5 and the calibration error need of each image."""

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor


def ranked(
    logits: Float32[Tensor, "B K"], label: Int[Tensor, " B"]
) -> tuple[Int64[Tensor, " B"], Float32[Tensor, " B"], Int64[Tensor, " B"]]:
    """Of every image the classes before its own (equal ones in class order), top prob and class."""
    finite = logits.isfinite().all(dim=1)
    own = logits.gather(1, label[:, None].long())
    index = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (index < label[:, None]))
    ranks = torch.where(finite, before.sum(dim=1), logits.shape[1])
    confidences, pred = logits.softmax(dim=1).max(dim=1)
    return ranks, torch.where(finite, confidences, 0.0), pred
