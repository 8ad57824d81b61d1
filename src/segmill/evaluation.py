"""Evaluation on Lightning: one confusion matrix over all images and processes.

Integers are summed, nothing is averaged over images or processes, so any number of processes
gives the same scores to the last digit, as long as each image is seen once (`data.stream.Shard`).
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import lightning
import numpy as np
import torch
from jaxtyping import Int, Int64, Integer, UInt8
from torch import Tensor, distributed
from torchmetrics import Metric

from segmill.data.labelled_image import NO_LABEL
from segmill.draws import draws_of
from segmill.errors import SegmillError
from segmill.inference import predict_label, predict_log_prob
from segmill.metrics import SCALARS, scores
from segmill.models.discriminative import Discriminative
from segmill.ops.confusion import update_confusion
from segmill.protocol import Protocol
from segmill.tta.counts import ImageCounts
from segmill.tta.ranking import ranked


class ConfusionMetric(Metric):
    """Confusion matrix of everything since `reset`, summed over the processes.

    Predictions of K and more are misses (segmill.metrics). They are counted as class K, which is
    why the state has a row and a column more than there are classes.
    """

    full_state_update = False
    higher_is_better = True
    counts: Int64[Tensor, "K1 K1"]

    def __init__(self, *, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        empty = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
        self.add_state("counts", default=empty, dist_reduce_fx="sum")

    def update(
        self,
        pred: Int[Tensor, "*size"] | UInt8[Tensor, "*size"],
        label: Int[Tensor, "*size"] | UInt8[Tensor, "*size"],
    ) -> None:
        """Count the pixels of one or more images; on CUDA without waiting for the device."""
        known = pred.clamp(max=self.num_classes)
        update_confusion(self.counts, label, known, ignore_index=self.ignore_index)

    def compute(self) -> dict[str, float]:
        """Return the scalar scores, `segmill.metrics.SCALARS`."""
        result = scores(self.confusion.cpu().numpy())
        return {name: float(result[name]) for name in SCALARS}

    def total(self) -> Int64[Tensor, "K J"]:
        """Return the matrix of all processes; every process has to call it."""
        with self.sync_context():
            return self.confusion

    @property
    def confusion(self) -> Int64[Tensor, "K J"]:
        """This process's matrix, rows = labels: (K, K), or (K, K + 1) when there are misses."""
        if outside := int(self.counts[-1].sum()):
            raise SegmillError(
                f"{outside} pixels have the label {self.num_classes}, which is outside the "
                f"{self.num_classes} classes. Map it in data.label_map; `segmill data check` lists "
                "the files."
            )
        misses = bool(self.counts[:, -1].any())
        return self.counts[:-1, : None if misses else -1].clone()


class EvaluationModule(lightning.LightningModule):
    """Predicts every image of `trainer.test` under the protocol.

    Afterwards `confusion` is the matrix of all images, and `per_image` the (index, mIoU) of each,
    both the same in every process. Batches are those of `SegmentationData.eval_loader`, or of
    `ImageData.eval_loader`: of images with one label there are also `image_counts`.
    """

    def __init__(
        self,
        *,
        model: Discriminative,
        protocol: Protocol,
        class_names: Sequence[str],
        one_label: bool = False,
    ) -> None:
        super().__init__()
        self.one_label = one_label
        self.model, self.protocol = model, protocol
        counting = {"num_classes": len(class_names), "ignore_index": protocol.ignore_index}
        self.metric, self.image_metric = ConfusionMetric(**counting), ConfusionMetric(**counting)
        self.confusion = self.metric.confusion.numpy()
        self.per_image: list[tuple[int, float]] = []
        self._ranked: list[tuple[int, int, float]] = []  # index, rank, top probability

    @property
    def image_counts(self) -> ImageCounts | None:
        """Ranks and confidences in the order of the images; None for maps of labels."""
        if not self.one_label:
            return None
        _, rank, confidence = zip(*self._ranked, strict=True)
        return ImageCounts(rank=np.array(rank), confidence=np.array(confidence))

    def on_test_epoch_start(self) -> None:
        """Start with nothing, also the second time."""
        self.metric.reset()
        self.per_image, self._ranked = [], []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Predict one image, count it, and keep its own score for the report."""
        # Process r has the images r, r + world, ...
        index = self.global_rank + batch_idx * self.trainer.world_size
        if self.one_label:
            pred = self._ranked_pred(batch, index)
        else:
            pred = predict_batch(self.model, batch, self.protocol)
        label = batch["label"]
        if self.one_label:
            label = label.masked_fill(label == NO_LABEL, self.protocol.ignore_index)
        self.image_metric.reset()
        self.image_metric.update(pred, label)
        self.metric.update(pred, label)
        alone = scores(self.image_metric.confusion.cpu().numpy())
        self.per_image.append((index, float(alone["mIoU"])))

    def on_test_epoch_end(self) -> None:
        """Put the processes' parts together."""
        self.confusion = self.metric.total().cpu().numpy()
        if self.trainer.world_size > 1:
            self.per_image = _of_processes(self.per_image, self.trainer.world_size)
            self._ranked = _of_processes(self._ranked, self.trainer.world_size)

    def _ranked_pred(self, batch: dict[str, Any], index: int) -> Integer[Tensor, "1 1 1"]:
        """The class of an image with one label; keeps what top-1, top-5 and ECE need."""
        images = [self.model.normalise(image) for image in batch["inputs"]]
        with draws_of(int(batch["index"]), images[0].device):
            log_prob = predict_log_prob(self.model.network, images, self.protocol)
        label = batch["label"].flatten()
        rank, confidence, pred = ranked(log_prob, label.clamp(min=0))
        known = int(label) != NO_LABEL
        self._ranked.append((index, int(rank) if known else -1, float(confidence)))
        return pred[:, None, None]


Item = TypeVar("Item", bound=tuple)


def _of_processes(own: list[Item], count: int) -> list[Item]:
    """All processes' items, in order."""
    parts: list[list[Item]] = [[] for _ in range(count)]
    distributed.all_gather_object(parts, own)
    return sorted(item for part in parts for item in part)


def predict_batch(
    model: Discriminative, batch: dict[str, Any], protocol: Protocol
) -> Integer[Tensor, "1 H W"]:
    """Predict the image of an evaluation batch, at its original size; draws belong to the image."""
    images = [model.normalise(image) for image in batch["inputs"]]
    height, width = batch["size"]
    with draws_of(int(batch["index"]), images[0].device):
        return predict_label(model.network, images, (int(height), int(width)), protocol)
