"""What happened to the images of one task of classification: top-1, top-5, confidence of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from segmill.errors import SegmillError
from segmill.tta.counts import ImageCounts
from segmill.tta.ranking import ranked
from segmill.tta.record import Course, names_of
from segmill.tta.results import TaskResult


class ClassificationRecord:
    """The rank of every image's class and the top probability: B images a step, one pixel each.

    A label of `ignore_index` does not count. Logits that are not finite are a miss of confidence 0.
    """

    headline = ImageCounts.headline

    def __init__(self, *, num_classes: int, ignore_index: int, device: torch.device) -> None:
        self._num_classes, self._ignore_index = num_classes, ignore_index
        self._ranks: list[Int64[Tensor, " B"]] = []
        self._confidences: list[Float32[Tensor, " B"]] = []
        self.course = Course(device)

    def add(
        self,
        batch: dict[str, Any],
        logits: Float[Tensor, "B K h w"],
        *,
        loss: float,
        seconds: float,
    ) -> Int[Tensor, "B 1 1"]:
        """Count a step of B images, each of one cell of logits."""
        if logits.shape[2:] != (1, 1):
            raise SegmillError(
                f"The model gives a map of {logits.shape[2]} x {logits.shape[3]} logits, and the "
                "data set has one label for an image. Choose a classifier "
                "(model/discriminative=classifier/NAME), or the data of a segmentation."
            )
        if logits.shape[1] != self._num_classes:
            raise SegmillError(
                f"The model has {logits.shape[1]} classes and the data set {self._num_classes}. "
                "Choose a classifier that was trained on the data set's classes, or set "
                "model.discriminative.network.num_classes and data.num_classes to the same number."
            )
        label = batch["label"].flatten()
        self._require_known(batch, label)
        ranks, confidences, pred = ranked(logits.flatten(1).float(), label.clamp(min=0))
        self._ranks.append(torch.where(label == self._ignore_index, -1, ranks))
        self._confidences.append(confidences)
        self.course.add(batch, loss=loss, seconds=seconds)
        return pred[:, None, None]

    def scores(self) -> dict[str, float]:
        """top1, top5 and ece of all images so far."""
        return self._counts().scores()

    def result(self, *, task: str, corruption: str, severity: int) -> TaskResult:
        """Everything about the task as arrays."""
        return TaskResult(
            task=task,
            corruption=corruption,
            severity=severity,
            counts=self._counts(),
            **self.course.facts(),
        )

    def gather(self) -> None:
        """Put the processes' steps together, each of which had other images of it."""
        tensors = zip(self._ranks, self._confidences, strict=True)
        mine = [(ranks.cpu(), confidences.cpu()) for ranks, confidences in tensors]
        steps = self.course.gather(mine)
        self._ranks, self._confidences = (list(each) for each in zip(*steps, strict=True))

    def _counts(self) -> ImageCounts:
        return ImageCounts(
            rank=torch.cat(self._ranks).cpu().numpy(),
            confidence=torch.cat(self._confidences).cpu().numpy().astype(np.float64),
        )

    def _require_known(self, batch: dict[str, Any], label: Int[Tensor, " B"]) -> None:
        outside = ((label < 0) | (label >= self._num_classes)) & (label != self._ignore_index)
        if outside.any():
            which = int(outside.nonzero()[0])
            raise SegmillError(
                f"Image {names_of(batch)[which]} has the label {int(label[which])}, which is "
                f"outside the {self._num_classes} classes. data.classes and the folders of the "
                "data set have to be those that the classifier was trained on."
            )
