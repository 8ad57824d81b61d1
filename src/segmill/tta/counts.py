"""What is kept of a task's images: enough for every score of any selection of them.

`PixelCounts` is of segmentation, `ImageCounts` of classification. Results, tables and intervals use
what both have, `Counts`, and know no kind of task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int64

from segmill.metrics import SCALARS, scores

TOP = 5
BINS = 15


@runtime_checkable
class Counts(Protocol):
    """Of N images.

    `headline` names the score that tables show and compare, `beside` those whose means they add,
    `shown` those of a CSV file.
    """

    headline: ClassVar[str]
    beside: ClassVar[tuple[str, ...]]
    shown: ClassVar[tuple[str, ...]]

    def __len__(self) -> int:
        """Images."""
        ...

    def scores(self) -> dict[str, float]:
        """All scalars as fractions, the headline among them; NaN where nothing is labelled."""
        ...

    def by_class(self) -> dict[str, list[float]]:
        """Scores that every class has, for those who read the results by program."""
        ...

    def sums(self) -> Int64[np.ndarray, "N M"]:
        """Numbers of every image whose sums over a selection give the selection's headline."""
        ...

    def headline_of(
        self, sums: Float[np.ndarray, "R M"] | Int64[np.ndarray, "R M"]
    ) -> Float[np.ndarray, " R"]:
        """The headline of R selections, from the sums of each."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """What `counts_from` reads."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelCounts:
    """Of every image the areas of its classes, and one confusion matrix of all.

    Per image only hits, label and prediction are kept: enough for every IoU of any selection of
    images, at 3 K numbers instead of K x K.
    """

    headline: ClassVar[str] = "mIoU"
    beside: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ("mIoU", "mAcc", "aAcc")
    areas: Int64[np.ndarray, "N 3 K"]
    confusion: Int64[np.ndarray, "K J"]

    def __post_init__(self) -> None:
        assert (self.areas.sum(axis=0) == areas_of(self.confusion)).all(), (
            "the areas of the images do not add up to the confusion matrix"
        )

    def __len__(self) -> int:
        """Images."""
        return len(self.areas)

    def scores(self) -> dict[str, float]:
        """The scalars of metrics.py, of the confusion matrix of all images."""
        found = scores(self.confusion)
        return {name: float(found[name]) for name in SCALARS}

    def by_class(self) -> dict[str, list[float]]:
        """IoU of every class."""
        return {"IoU": np.asarray(scores(self.confusion)["IoU"]).tolist()}

    def sums(self) -> Int64[np.ndarray, "N M"]:
        """The areas, one after the other."""
        return self.areas.reshape(len(self.areas), -1)

    def headline_of(
        self, sums: Float[np.ndarray, "R M"] | Int64[np.ndarray, "R M"]
    ) -> Float[np.ndarray, " R"]:
        """mIoU of summed areas."""
        return miou_of_areas(sums.reshape(len(sums), 3, -1))

    def arrays(self) -> dict[str, np.ndarray]:
        """What `counts_from` reads."""
        return {"areas": self.areas, "confusion": self.confusion}


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """Of every image how many classes were thought likelier than its own, and the top probability.

    `rank` is 0 where the prediction is right; -1 is an image without a label, which does not count.
    """

    headline: ClassVar[str] = "top1"
    beside: ClassVar[tuple[str, ...]] = ("top5", "ece")
    shown: ClassVar[tuple[str, ...]] = ("top1", "top5", "ece")
    rank: Int64[np.ndarray, " N"]
    confidence: Float[np.ndarray, " N"]

    def __len__(self) -> int:
        """Images."""
        return len(self.rank)

    def scores(self) -> dict[str, float]:
        """top1, top5 and the expected calibration error (ece)."""
        counted = self.rank >= 0
        rank, confidence = self.rank[counted], self.confidence[counted]
        if not len(rank):
            return dict.fromkeys(self.shown, math.nan)
        return {
            "top1": float((rank == 0).mean()),
            "top5": float((rank < TOP).mean()),
            "ece": calibration_error(confidence, rank == 0),
        }

    def by_class(self) -> dict[str, list[float]]:
        """Nothing: ImageNet has 50 images a class."""
        return {}

    def sums(self) -> Int64[np.ndarray, "N M"]:
        """Whether it is right, and whether it counts."""
        return np.stack([self.rank == 0, self.rank >= 0], axis=1).astype(np.int64)

    def headline_of(
        self, sums: Float[np.ndarray, "R M"] | Int64[np.ndarray, "R M"]
    ) -> Float[np.ndarray, " R"]:
        """The share that is right."""
        right, counted = sums.T
        return np.where(counted > 0, right / np.maximum(counted, 1), np.nan)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `counts_from` reads."""
        return {"rank": self.rank, "confidence": self.confidence}


def counts_from(arrays: Mapping[str, np.ndarray]) -> Counts:
    """What gave `Counts.arrays`, among other arrays."""
    if "rank" in arrays:
        return ImageCounts(rank=arrays["rank"], confidence=arrays["confidence"])
    return PixelCounts(areas=arrays["areas"], confusion=arrays["confusion"])


def calibration_error(confidence: Float[np.ndarray, " N"], right: np.ndarray) -> float:
    """Expected calibration error of 15 bins of equal width, open below and closed above.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: the mean over the images of
    |accuracy - mean confidence| of their bin.
    """
    which = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(which, weights=right.astype(np.float64) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def areas_of(confusion: Int[np.ndarray, "K J"]) -> Int64[np.ndarray, "3 K"]:
    """Pixels that were hit, of the label, and of the prediction, for every class."""
    classes = len(confusion)
    hits, pred = np.diagonal(confusion), confusion[:, :classes].sum(axis=0)
    return np.stack([hits, confusion.sum(axis=1), pred]).astype(np.int64)


def miou_of_areas(
    areas: Float[np.ndarray, "R 3 K"] | Int64[np.ndarray, "R 3 K"],
) -> Float[np.ndarray, " R"]:
    """The formula of metrics.py: a class in no label and no prediction drops out of the mean."""
    hit, label, pred = np.moveaxis(areas, 1, 0)
    union = label + pred - hit
    present = union > 0
    iou = np.where(present, hit / np.where(present, union, 1), 0)
    count = present.sum(axis=1)
    return np.where(count > 0, iou.sum(axis=1) / np.maximum(count, 1), np.nan)
