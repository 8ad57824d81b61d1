"""One optimizer step and one validation on Jittor; `segmill.training` is its twin on torch."""

from collections.abc import Iterable, Mapping
from typing import Any

import jittor as jt
import numpy as np
from jaxtyping import Int64, Integer, UInt8

from segmill.data.transforms import NO_JITTER, apply_jitter
from segmill.jittor import random
from segmill.jittor.adamw import AdamW
from segmill.jittor.inference import predict_label
from segmill.jittor.models.discriminative import Discriminative
from segmill.metrics import confusion_with_misses, scores
from segmill.protocol import Protocol
from segmill.schedules import Schedule
from segmill.seeds import image_seed, step_seed


class Training:
    """A model, its optimizer and its schedule, after `step` optimizer steps."""

    def __init__(
        self,
        *,
        model: Discriminative,
        optimizer: AdamW,
        schedule: Schedule,
        max_steps: int,
        seed: int,
        step: int = 0,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.max_steps, self.seed, self.step = max_steps, seed, step
        self._base = [group["lr"] for group in optimizer.groups]

    @property
    def rate(self) -> float:
        """The learning rate of the first group at the next step."""
        return self.schedule.rate(self._base[0], self.step, self.max_steps)

    def take_step(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Update the network by one batch; the loss terms before the update."""
        self.model.train()
        for group, base in zip(self.optimizer.groups, self._base, strict=True):
            group["lr"] = self.schedule.rate(base, self.step, self.max_steps)
        random.seed(step_seed(self.seed, self.step, 0))
        image = jittered(batch["image"], batch["jitter"])
        terms = self.model.losses(image, batch["label"], batch["valid"])
        loss = sum(terms.values())
        names = list(self.optimizer.parameters)
        gradients = jt.grad(loss, [self.optimizer.parameters[name] for name in names])
        self.optimizer.step(dict(zip(names, gradients, strict=True)))
        self.step += 1
        # Waiting each step keeps the graph, and with it the compiled kernels, the same.
        jt.sync_all()
        return {name: float(term.numpy()[0]) for name, term in terms.items()}


class Evaluation:
    """The confusion matrix of a split, and each image's own mIoU."""

    def __init__(self, model: Discriminative, protocol: Protocol, *, num_classes: int) -> None:
        self.model, self.protocol, self.num_classes = model, protocol, num_classes
        self.counts = np.zeros((num_classes, num_classes + 1), np.int64)
        self.per_image: list[tuple[int, float]] = []

    def run(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Predict and count every image."""
        for item in items:
            pred = predict(self.model, item["inputs"], item["size"], self.protocol, item["index"])
            counts = confusion_with_misses(
                item["label"], pred, self.num_classes, self.protocol.ignore_index
            )
            self.counts += counts
            self.per_image.append((item["index"], float(scores(_cut(counts))["mIoU"])))

    @property
    def confusion(self) -> Int64[np.ndarray, "K J"]:
        """Rows are labels: (K, K), or (K, K + 1) when there are misses."""
        return _cut(self.counts)


def predict(
    model: Discriminative,
    inputs: Iterable[UInt8[np.ndarray, "1 C _h _w"]],
    size: tuple[int, int],
    protocol: Protocol,
    index: int,
) -> Integer[np.ndarray, "1 H W"]:
    """Classes of one image at `size`; its random draws follow from `index` (segmill.seeds)."""
    model.eval()
    before = random.state()
    random.seed(image_seed(index))
    images = [model.normalise(image) for image in inputs]
    label = predict_label(model.network, images, size, protocol)
    random.set_state(before)
    return label


def jittered(image: UInt8[np.ndarray, "B C H W"], jitter: Any) -> UInt8[np.ndarray, "B C H W"]:
    """Photometric distortion of the colours by the drawn parameters; depth stays."""
    if all(np.array_equal(each, NO_JITTER) for each in jitter):
        return image
    image = image.copy()
    for pixels, drawn in zip(image, jitter, strict=True):
        colours = np.ascontiguousarray(pixels[:3].transpose(1, 2, 0))
        pixels[:3] = apply_jitter(colours, drawn).transpose(2, 0, 1)
    return image


def _cut(counts: Int64[np.ndarray, "K J"]) -> Int64[np.ndarray, "K I"]:
    return counts if counts[:, -1].any() else counts[:, :-1]
