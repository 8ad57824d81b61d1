"""Counting (label, prediction) pairs on the device, without a mask and without a wait."""

import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from segmill.errors import SegmillError


@torch.no_grad()
def update_confusion(
    confusion: Int64[Tensor, "K K"],
    label: Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"],
    pred: Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"],
    *,
    ignore_index: int = 255,
) -> None:
    """Add the pixels to `confusion` in place: row = label, column = prediction; deterministic.

    Predictions are below K. A label outside the classes that is not `ignore_index` raises on the
    CPU; on CUDA, where looking would mean waiting, it is not counted.
    """
    if confusion.is_cuda:
        # Imported here: triton is absent from CPU builds of torch.
        from segmill.ops.triton_confusion import update_confusion_cuda

        update_confusion_cuda(confusion, label, pred, ignore_index=ignore_index)
        return
    num_classes = len(confusion)
    if label.dtype == torch.uint8 and num_classes <= ignore_index < 256:
        # One row for each value of a byte: no mask, and int32 halves the traffic of int64.
        row, ignored = label.int(), ignore_index
    else:
        row, ignored = torch.where(label == ignore_index, num_classes, label).long(), num_classes
    index = row.mul_(num_classes).add_(pred).flatten()
    counts = index.bincount(minlength=(ignored + 1) * num_classes)
    inside = counts[: num_classes**2].reshape(num_classes, num_classes)
    skipped = counts[ignored * num_classes : (ignored + 1) * num_classes]
    if inside.sum() + skipped.sum() != label.numel():
        wrong = label[(label != ignore_index) & (label >= num_classes)]
        raise SegmillError(
            f"The label has the value {int(wrong[0])}, but there are {num_classes} classes "
            f"(ignored: {ignore_index}). Map it with data.label_map, or correct data.num_classes."
        )
    confusion += inside
