"""One confusion matrix, and every score that is read off it. Fractions 0..1; NaN = undefined.

Follows MMSegmentation 1.2.2 `IoUMetric` (nan_to_num=None). Rows are labels, columns predictions.
A class that is in no label and no prediction has no IoU, one that is in no label has no accuracy;
both are NaN and drop out of the means. DFormer and much other RGB-D work publish means in which
such a class counts as 0 (`absent_class="zero"`): never more, and less as soon as one is absent.

A network may answer "none of the K classes" (ESPNet's twelfth class on 11). Such a pixel is a
miss: it counts in the area of its label and in the area of no prediction. `confusion_with_misses`
gives it a column of its own, K; `scores` takes a (K, K) and a (K, K + 1) matrix alike.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int64, Integer

from segmill.errors import SegmillError

AbsentClass = Literal["drop", "zero"]

SCALARS = ("mIoU", "mAcc", "aAcc", "FWIoU", "mDice", "mFscore", "mPrecision", "mRecall")


def confusion_matrix(
    label: Integer[np.ndarray, "*size"],
    pred: Integer[np.ndarray, "*size"],
    num_classes: int,
    ignore_index: int = 255,
) -> Int64[np.ndarray, "K K"]:
    """Count (label, prediction) pairs of all pixels whose label is not `ignore_index`."""
    confusion = confusion_with_misses(label, pred, num_classes, ignore_index)
    if outside := int(confusion[:, -1].sum()):
        raise SegmillError(
            f"{outside} predictions are outside the {num_classes} classes. Does the network have "
            "more outputs than the data set has classes? `confusion_with_misses` counts such "
            "pixels as wrong."
        )
    return confusion[:, :-1].copy()


def confusion_with_misses(
    label: Integer[np.ndarray, "*size"],
    pred: Integer[np.ndarray, "*size"],
    num_classes: int,
    ignore_index: int = 255,
) -> Int64[np.ndarray, "K J"]:
    """The same as (K, K + 1): column K counts the predictions outside 0..K-1."""
    counted = label != ignore_index
    label, pred = label[counted].astype(np.int64), pred[counted].astype(np.int64)
    if label.size and not (label.min() >= 0 and label.max() < num_classes):
        raise SegmillError(
            f"Labels {label.min()}..{label.max()} are not all among the {num_classes} classes. "
            "Map them in the data set's label_map; `segmill data check` lists the files."
        )
    pred = np.where((pred >= 0) & (pred < num_classes), pred, num_classes)
    columns = num_classes + 1
    counts = np.bincount(label * columns + pred, minlength=num_classes * columns)
    return counts.reshape(num_classes, columns).astype(np.int64)


def scores(
    confusion: Int[np.ndarray, "K J"], *, absent_class: AbsentClass = "drop"
) -> dict[str, float | Float[np.ndarray, " K"]]:
    """Means as floats (`SCALARS`), and per class the arrays IoU, Acc, Dice, Fscore, ...

    A class without a score is NaN in the arrays; in the means it drops out or counts as zero.
    `Recall` equals `Acc` (correct / label area); both names stay because tables use both.
    """
    classes = len(confusion)
    hit = np.diagonal(confusion).astype(np.float64)
    label = confusion.sum(1).astype(np.float64)
    pred = confusion[:, :classes].sum(0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = hit / (label + pred - hit)
        dice = 2 * hit / (label + pred)
        precision, recall = hit / pred, hit / label
        fscore = 2 * precision * recall / (precision + recall)
        accuracy = float(hit.sum() / label.sum())
        fwiou = float(np.where(label > 0, label * iou, 0).sum() / label.sum())
    per_class = {
        "IoU": iou,
        "Acc": recall,
        "Dice": dice,
        "Fscore": fscore,
        "Precision": precision,
        "Recall": recall,
    }
    means = {f"m{name}": _mean(values, absent_class) for name, values in per_class.items()}
    return {**means, "aAcc": accuracy, "FWIoU": fwiou, **per_class}


def _mean(values: Float[np.ndarray, " K"], absent_class: AbsentClass) -> float:
    undefined = np.isnan(values)
    if absent_class == "zero":
        return float(np.where(undefined, 0.0, values).mean())
    return float(values[~undefined].mean()) if not undefined.all() else float("nan")
