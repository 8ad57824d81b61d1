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
    # Ignored pixels fall into an extra row; int32 halves the traffic of int64.
    row = torch.where(label == ignore_index, num_classes, label.int())
    counts = (
        (row * num_classes + pred).flatten().bincount(minlength=(num_classes + 1) * num_classes)
    )
    if len(counts) > (num_classes + 1) * num_classes:
        raise SegmillError(
            f"Labels or predictions lie outside the {num_classes} classes (ignored: "
            f"{ignore_index}): largest label {int(label.max())}, largest prediction "
            f"{int(pred.max())}. Map them with data.label_map, or correct data.num_classes."
        )
    confusion += counts[: num_classes * num_classes].reshape(num_classes, num_classes)
