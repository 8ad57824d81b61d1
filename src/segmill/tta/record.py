"""What happened to the images of one task: counted on the device, read once at the end.

`TaskRecord` is of segmentation; `classification_record.py` has the other. The task's data makes it
(`new_record`), so that TTAModule knows no kind of task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor, distributed

from segmill.evaluation import ConfusionMetric
from segmill.inference import label_of_logits
from segmill.metrics import scores
from segmill.protocol import Protocol as ScoringProtocol
from segmill.tta.counts import PixelCounts, areas_of
from segmill.tta.results import TaskResult


@runtime_checkable
class Record(Protocol):
    """The images of a task so far. `headline` names the score that matters most."""

    headline: str
    course: Course

    def add(
        self,
        batch: dict[str, Any],
        logits: Float[Tensor, "B K h w"],
        *,
        loss: float,
        seconds: float,
    ) -> Integer[Tensor, "B H W"]:
        """Count a step of B images, whose classes it returns; `seconds` are of all of them."""
        ...

    def scores(self) -> dict[str, float]:
        """What is worth watching, the headline first: fractions, of all images so far."""
        ...

    def result(self, *, task: str, corruption: str, severity: int) -> TaskResult:
        """Everything about the task as arrays."""
        ...


class Course:
    """Names, losses and seconds of a task's images, and the memory that they took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.names: list[str] = []
        self.losses: list[float] = []
        self.seconds: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, batch: dict[str, Any], *, loss: float, seconds: float) -> None:
        """Note a step; every image of it has the step's loss and its share of the seconds."""
        names = names_of(batch)
        self.names += names
        self.losses += [loss] * len(names)
        self.seconds += [seconds / len(names)] * len(names)

    def entries(self) -> list[tuple[str, float, float]]:
        """Name, loss and seconds of every image."""
        return list(zip(self.names, self.losses, self.seconds, strict=True))

    def replace(self, entries: Sequence[tuple[str, float, float]]) -> None:
        """Go on with other images: those of all processes, whose seconds run side by side."""
        names, losses, seconds = zip(*entries, strict=True)
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        self.names, self.losses = list(names), list(losses)
        self.seconds = [each / processes for each in seconds]

    def mean_loss(self) -> float:
        """Mean over the images so far."""
        return float(np.mean(self.losses))

    def facts(self) -> dict[str, Any]:
        """The fields of a TaskResult that every kind of task has."""
        on_gpu = self._device.type == "cuda"
        return {
            "names": tuple(self.names),
            # The median leaves out what belongs to no image: compilation, a slow disk.
            "seconds": float(np.median(self.seconds)),
            "peak_memory": torch.cuda.max_memory_allocated(self._device) if on_gpu else 0,
            "loss": self.mean_loss(),
        }


class TaskRecord:
    """One confusion matrix of the task, and the areas of every image: one image a step.

    A prediction is made at the label's size by the rules of `protocol`.
    """

    headline = PixelCounts.headline

    def __init__(
        self, *, num_classes: int, protocol: ScoringProtocol, device: torch.device
    ) -> None:
        counting = {"num_classes": num_classes, "ignore_index": protocol.ignore_index}
        self._metric = ConfusionMetric(**counting).to(device)
        self._image_metric = ConfusionMetric(**counting).to(device)
        self._protocol = protocol
        self._confusions: list[Int64[Tensor, "K1 K1"]] = []
        self.course = Course(device)

    def add(
        self,
        batch: dict[str, Any],
        logits: Float[Tensor, "1 K h w"],
        *,
        loss: float,
        seconds: float,
    ) -> Integer[Tensor, "1 H W"]:
        """Count one image."""
        content = batch["image"].shape[2], batch["image"].shape[3]
        height, width = batch["label"].shape[1:]
        pred = label_of_logits(logits, content, (height, width), self._protocol)
        self._image_metric.reset()
        self._image_metric.update(pred, batch["label"])
        self._metric.update(pred, batch["label"])
        self._confusions.append(self._image_metric.counts.clone())
        self.course.add(batch, loss=loss, seconds=seconds)
        return pred

    def scores(self) -> dict[str, float]:
        """mIoU of all images so far: of their summed confusion matrix, no mean over images."""
        found = scores(self._metric.confusion.cpu().numpy())
        return {self.headline: float(found[self.headline])}

    def result(self, *, task: str, corruption: str, severity: int) -> TaskResult:
        """Everything about the task as arrays."""
        each = torch.stack(self._confusions).cpu().numpy()
        counts = PixelCounts(
            # The last row holds labels outside the classes, which `confusion` has refused.
            areas=np.stack([areas_of(one[:-1]) for one in each]),
            confusion=self._metric.confusion.cpu().numpy(),
        )
        return TaskResult(
            task=task,
            corruption=corruption,
            severity=severity,
            counts=counts,
            **self.course.facts(),
        )


def names_of(batch: dict[str, Any]) -> list[str]:
    """The names of a batch's images; a single image may have a bare one."""
    names = batch["name"]
    return [names] if isinstance(names, str) else list(names)
