"""What happened to the images of one task: counted on the device, read once at the end.

`TaskRecord` is of segmentation; `classification_record.py` has the other. The task's data makes it
(`new_record`), so that TTAModule knows no kind of task.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor, distributed

from segmill.errors import SegmillError
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

    def gather(self) -> None:
        """Go on with the images of all processes, each of which had others."""
        ...

    def result(self, *, task: str, corruption: str, severity: int) -> TaskResult:
        """Everything about the task as arrays."""
        ...


Step = tuple[list[str], float, float]  # names, loss, seconds an image
Counted = TypeVar("Counted")


class Course:
    """Names, losses and seconds of a task's images, and the memory that they took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[Step] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, batch: dict[str, Any], *, loss: float, seconds: float) -> None:
        """Note a step; every image of it has the step's loss and its share of the seconds."""
        names = names_of(batch)
        self._steps.append((names, loss, seconds / len(names)))

    @property
    def names(self) -> list[str]:
        """Of the images so far, in order."""
        return [name for names, _, _ in self._steps for name in names]

    def gather(self, counted: list[Counted]) -> list[Counted]:
        """Go on with the images of all processes, in the order of their common stream.

        `counted` is what this process counted in each step; what all did comes back. The
        processes' seconds run side by side, so an image took a share of them.
        """
        steps = [*zip(self._steps, counted, strict=True)]
        parts: list[list[tuple[Step, Counted]]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, steps)
        every = [each for of_step in zip(*parts, strict=True) for each in of_step]
        self._steps = [(names, loss, took / len(parts)) for (names, loss, took), _ in every]
        return [each for _, each in every]

    def mean_loss(self) -> float:
        """Mean over the images so far."""
        return float(np.mean([loss for names, loss, _ in self._steps for _ in names]))

    def facts(self) -> dict[str, Any]:
        """The fields of a TaskResult that every kind of task has."""
        on_gpu = self._device.type == "cuda"
        return {
            "names": tuple(self.names),
            # The median leaves out what belongs to no image: compilation, a slow disk.
            "seconds": float(np.median([took for names, _, took in self._steps for _ in names])),
            "peak_memory": torch.cuda.max_memory_allocated(self._device) if on_gpu else 0,
            "loss": self.mean_loss(),
        }


SMALLEST = 64  # pixels a side; smaller images are one cell of logits of some networks


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
        if logits.shape[2:] == (1, 1) and min(content) > SMALLEST:
            raise SegmillError(
                "The model says one class of an image, and the data set has a label for every "
                "pixel. Choose a segmentation model, or the data of a classification (imagenet_c, "
                "digits_c)."
            )
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

    def gather(self) -> None:
        """Not called: the processes of a segmentation see the same images (step_plan.py)."""
        raise AssertionError("the processes of a segmentation share no images")

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
