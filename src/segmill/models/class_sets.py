"""Class sets: which few classes are worth a guide's forward pass in each window.

DUSA (NeurIPS 2024), as published for segmentation: the union of the top classes of all latent
pixels, cut to a cap in favour of the first choices. Classification is the case of one pixel: its
top classes, and some more that are drawn. No step waits for the device but the last, which reads
how many classes each window has, unless all have `min_classes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from segmill.draws import Generators, drawn
from segmill.models.class_split import ClassSplit


@dataclass(frozen=True)
class ClassSets:
    """Classes of each window, ascending, padded at the end by repeating the first.

    `mask` is false at latent pixels whose first choice had to be left out. `widths` are the
    windows' own counts, rounded up as asked; the widest is M.
    """

    classes: Int64[Tensor, "N M"]
    valid: Bool[Tensor, "N M"]  # false: padding
    mask: Bool[Tensor, "N h w"]
    widths: tuple[int, ...]


def class_sets(
    window_logits: Float[Tensor, "N K h w"],
    *,
    topk: int,
    max_classes: int,
    min_classes: int,
    buckets: Sequence[int],
    generator: Generators,
    split: ClassSplit,
    log_prob: Float[Tensor, "N K"] | None = None,
) -> ClassSets:
    """The union U of every pixel's `topk` classes, per window.

    Where U exceeds `max_classes`, first choices stay and the rest is drawn; where these alone
    exceed it, they are drawn too. A smaller U than `min_classes` is filled up by drawing without
    replacement: all other classes alike, or by `log_prob`, which need not be normalised. The
    generator advances by as much whether or not a draw decides. Several processes use the first
    one's result. Widths are rounded up to one of `buckets`, then to a multiple of the processes.
    """
    count, num_classes, height, width = window_logits.shape
    limit = min(max_classes, num_classes)
    top = window_logits.detach().topk(topk, dim=1).indices
    first = top[:, 0].flatten(1)
    empty = torch.zeros(count, num_classes, device=top.device)
    in_union = empty.scatter(1, top.flatten(1), 1.0)
    is_first = empty.scatter(1, first, 1.0)
    random = drawn(
        lambda rows, own: torch.rand(rows, num_classes, generator=own, device=own.device),
        count,
        generator,
    ).to(top.device)
    if log_prob is not None:
        random = random.where(in_union > 0, _gumbel_order(random, log_prob.detach()))
    ranked = (2 * is_first + in_union + random).topk(limit, dim=1).indices
    fewest = min(min_classes, limit)
    kept = in_union.sum(dim=1).clamp(fewest, limit)

    # Ascending, so that sums do not depend on the draw; what is left out goes to the end.
    position = torch.arange(limit, device=top.device)
    ordered = ranked.where(position < kept[:, None], num_classes).sort(dim=1).values
    ordered = ordered.where(ordered < num_classes, ordered[:, :1])
    chosen = torch.zeros_like(empty, dtype=torch.int64).scatter(1, ordered, 1)
    mask = chosen.gather(1, first)
    agreed = split.of_first(torch.cat([kept.long()[:, None], ordered, mask], dim=1))
    kept, ordered, mask = agreed.split([1, limit, height * width], dim=1)

    # The one moment that waits for the device.
    counts: list[int] = [limit] * count if fewest == limit else kept[:, 0].tolist()
    widths = tuple(
        rounded(each, buckets=buckets, limit=limit, multiple=split.size) for each in counts
    )
    slots = torch.arange(max(widths), device=top.device)
    classes = ordered[:, slots.clamp(max=limit - 1)]
    valid = slots < kept
    return ClassSets(
        classes=classes.where(valid, classes[:, :1]),
        valid=valid,
        mask=mask.bool().unflatten(1, (height, width)),
        widths=widths,
    )


def _gumbel_order(
    uniform: Float[Tensor, "N K"], log_prob: Float[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """Numbers from 0 to below 1 whose largest n are a draw of n classes without replacement.

    That of one class after the other by its share of what is left (torch.multinomial) has the
    order of log_prob + Gumbel noise (Yellott 1977).
    """
    noise = -torch.log(-torch.log(uniform))
    return (log_prob + noise).argsort(dim=1).argsort(dim=1) / uniform.shape[1]


def rounded(count: int, *, buckets: Sequence[int], limit: int, multiple: int) -> int:
    """`count` rounded up to a bucket, never beyond `limit` for its sake, then to a multiple."""
    bucket = min((each for each in buckets if each >= count), default=count)
    return -(-max(min(bucket, limit), count) // multiple) * multiple
