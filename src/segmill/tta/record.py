"""What happened to the images of one task: counted on the device, read once at the end."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, Int64, Integer, UInt8
from torch import Tensor

from segmill.evaluation import ConfusionMetric
from segmill.metrics import scores
from segmill.tta.results import TaskResult, areas_of


class TaskRecord:
    """One confusion matrix of the task, and of every image its areas, loss and seconds."""

    def __init__(self, *, num_classes: int, ignore_index: int, device: torch.device) -> None:
        counting = {"num_classes": num_classes, "ignore_index": ignore_index}
        self._metric = ConfusionMetric(**counting).to(device)
        self._image_metric = ConfusionMetric(**counting).to(device)
        self._device = device
        self.names: list[str] = []
        self._confusions: list[Int64[Tensor, "K1 K1"]] = []
        self._losses: list[float] = []
        self._seconds: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(
        self,
        name: str,
        pred: Integer[Tensor, "1 H W"],
        label: UInt8[Tensor, "1 H W"] | Int[Tensor, "1 H W"],
        *,
        loss: float,
        seconds: float,
    ) -> None:
        """Count one image."""
        self._image_metric.reset()
        self._image_metric.update(pred, label)
        self._metric.update(pred, label)
        self.names.append(name)
        self._confusions.append(self._image_metric.counts.clone())
        self._losses.append(loss)
        self._seconds.append(seconds)

    def miou(self) -> float:
        """mIoU of all images so far: of their summed confusion matrix, no mean over images."""
        return float(scores(self._metric.confusion.cpu().numpy())["mIoU"])

    def mean_loss(self) -> float:
        """Mean over the images so far."""
        return float(np.mean(self._losses))

    def result(self, *, task: str, corruption: str, severity: int) -> TaskResult:
        """Everything about the task as arrays."""
        counts = torch.stack(self._confusions).cpu().numpy()
        on_gpu = self._device.type == "cuda"
        return TaskResult(
            task=task,
            corruption=corruption,
            severity=severity,
            names=tuple(self.names),
            # The last row holds labels outside the classes, which `confusion` has refused.
            areas=np.stack([areas_of(each[:-1]) for each in counts]),
            confusion=self._metric.confusion.cpu().numpy(),
            # The median leaves out what belongs to no image: compilation, a slow disk.
            seconds=float(np.median(self._seconds)),
            peak_memory=torch.cuda.max_memory_allocated(self._device) if on_gpu else 0,
            loss=self.mean_loss(),
        )
