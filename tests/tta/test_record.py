"""What a task's record counts, and what it makes of it."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmill.errors import SegmillError
from segmill.metrics import scores
from segmill.tta.record import TaskRecord
from tiny_tasks import PROTOCOL

CLASSES = 4


def record() -> TaskRecord:
    return TaskRecord(num_classes=CLASSES, protocol=PROTOCOL, device=torch.device("cpu"))


def maps(seed: int) -> tuple[Tensor, Tensor]:
    """Prediction and label; two of four classes are absent from every second image."""
    generator = torch.Generator().manual_seed(seed)
    top = CLASSES if seed % 2 else 2
    pred = torch.randint(top, (1, 6, 7), generator=generator)
    label = torch.randint(top, (1, 6, 7), generator=generator)
    label[0, 0] = 255
    return pred, label.to(torch.uint8)


def step(seed: int) -> tuple[dict[str, Any], Tensor]:
    """A batch, and logits whose argmax is the prediction of `maps`."""
    pred, label = maps(seed)
    logits = F.one_hot(pred, CLASSES).permute(0, 3, 1, 2).float()
    image = torch.zeros(1, 3, *pred.shape[1:], dtype=torch.uint8)
    return {"image": image, "label": label, "name": f"image {seed}"}, logits


def filled(count: int) -> TaskRecord:
    found = record()
    for seed in range(count):
        pred = found.add(*step(seed), loss=float(seed), seconds=float(seed**2))
        assert torch.equal(pred, maps(seed)[0])
    return found


def confusion(seed: int) -> np.ndarray:
    pred, label = (each.numpy().ravel() for each in maps(seed))
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(counts, (label[label != 255], pred[label != 255]), 1)
    return counts


def test_the_score_is_that_of_all_pixels_and_no_mean_over_images() -> None:
    total = sum(confusion(seed) for seed in range(4))
    assert filled(4).scores()["mIoU"] == scores(total)["mIoU"]
    mean = np.mean([scores(confusion(seed))["mIoU"] for seed in range(4)])
    assert abs(filled(4).scores()["mIoU"] - mean) > 1e-3


def test_the_result_has_every_image_by_itself() -> None:
    result = filled(4).result(task="01_fog_5", corruption="fog", severity=5)
    assert result.names == tuple(f"image {seed}" for seed in range(4))
    np.testing.assert_array_equal(
        result.counts.confusion[:, :CLASSES], sum(confusion(seed) for seed in range(4))
    )
    for seed in range(4):
        hits, label, pred = result.counts.areas[seed]
        expected = confusion(seed)
        np.testing.assert_array_equal(hits, np.diagonal(expected))
        np.testing.assert_array_equal(label, expected.sum(axis=1))
        np.testing.assert_array_equal(pred, expected.sum(axis=0))


def test_losses_are_averaged_and_a_slow_first_image_is_not_the_speed() -> None:
    result = filled(5).result(task="01_fog_5", corruption="fog", severity=5)
    assert result.loss == 2.0
    assert result.seconds == 4.0
    assert result.peak_memory == 0, "measured on GPUs only"


def test_a_label_outside_the_classes_is_refused() -> None:
    batch, logits = step(0)
    batch["label"][0, 3, 3] = 77
    found = record()
    with pytest.raises(SegmillError, match="the value 77"):
        found.add(batch, logits, loss=0.0, seconds=0.0)


def test_one_class_for_a_whole_image_is_refused() -> None:
    label = torch.zeros(1, 96, 96, dtype=torch.uint8)
    batch = {"image": torch.zeros(1, 3, 96, 96, dtype=torch.uint8), "label": label, "name": "a"}
    with pytest.raises(SegmillError, match="Choose a segmentation model"):
        record().add(batch, torch.zeros(1, CLASSES, 1, 1), loss=0.0, seconds=0.0)
