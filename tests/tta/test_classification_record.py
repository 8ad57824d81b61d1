"""What a task of classification counts: against a few lines by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from segmill.errors import SegmillError
from segmill.tta.classification_record import ClassificationRecord
from segmill.tta.counts import ImageCounts

CLASSES = 8


def record() -> ClassificationRecord:
    return ClassificationRecord(num_classes=CLASSES, ignore_index=-1, device=torch.device("cpu"))


def steps(*sizes: int) -> list[tuple[dict[str, Any], Tensor]]:
    """Batches of random logits, as a classifier gives them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step, size in enumerate(sizes):
        label = torch.randint(CLASSES, (size, 1, 1), generator=generator)
        logits = 3 * torch.randn(size, CLASSES, 1, 1, generator=generator)
        names = [f"{step}/{index}" for index in range(size)]
        found.append(({"label": label, "name": names}, logits))
    return found


def filled(*sizes: int) -> ClassificationRecord:
    found = record()
    for loss, (batch, logits) in enumerate(steps(*sizes)):
        found.add(batch, logits, loss=float(loss), seconds=2.0)
    return found


def by_hand(*sizes: int) -> dict[str, float]:
    """One image after the other, bins by comparison."""
    images = [
        (logits[b, :, 0, 0].double().numpy(), int(batch["label"][b]))
        for batch, logits in steps(*sizes)
        for b in range(len(logits))
    ]
    right, among, sure = [], [], []
    for logits, label in images:
        order = list(np.argsort(-logits))
        right.append(float(order[0] == label))
        among.append(float(label in order[:5]))
        sure.append(float((np.exp(logits) / np.exp(logits).sum()).max()))
    gap = 0.0
    for low in range(15):
        inside = [i for i, p in enumerate(sure) if low / 15 < p <= (low + 1) / 15]
        if inside:
            accuracy = np.mean([right[i] for i in inside])
            confidence = np.mean([sure[i] for i in inside])
            gap += len(inside) / len(images) * abs(accuracy - confidence)
    return {"top1": float(np.mean(right)), "top5": float(np.mean(among)), "ece": float(gap)}


def test_top1_top5_and_calibration_are_those_of_a_loop_over_images() -> None:
    found, expected = filled(8, 8, 3).scores(), by_hand(8, 8, 3)
    assert list(found) == ["top1", "top5", "ece"]
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
    assert 0 < found["top1"] < found["top5"] < 1
    # Probabilities are of float32.
    assert found["ece"] == pytest.approx(expected["ece"], abs=1e-6)


def test_how_images_are_batched_changes_no_score_and_the_last_batch_may_be_smaller() -> None:
    whole = record()
    batches = steps(8, 8, 3)
    label = torch.cat([batch["label"] for batch, _ in batches])
    names = [name for batch, _ in batches for name in batch["name"]]
    logits = torch.cat([each for _, each in batches])
    pred = whole.add({"label": label, "name": names}, logits, loss=1.0, seconds=1.0)
    assert whole.scores() == filled(8, 8, 3).scores()
    torch.testing.assert_close(pred, logits.argmax(dim=1))


def test_losses_are_averaged_and_seconds_shared_over_images() -> None:
    result = filled(8, 8, 2).result(task="01_fog_5", corruption="fog", severity=5)
    assert len(result.names) == len(result.counts) == 18
    assert result.loss == pytest.approx((0 * 8 + 1 * 8 + 2 * 2) / 18)
    assert result.seconds == 0.25
    assert result.score == result.scores["top1"] == filled(8, 8, 2).scores()["top1"]


def test_a_single_image_may_have_a_bare_name() -> None:
    found = record()
    label = torch.tensor([[[3]]])
    found.add(
        {"label": label, "name": "one"},
        torch.eye(CLASSES)[3:4, :, None, None],
        loss=0.0,
        seconds=0.0,
    )
    assert found.course.names == ["one"]
    assert found.scores()["top1"] == 1


def test_255_is_a_class_and_minus_one_does_not_count() -> None:
    found = ClassificationRecord(num_classes=1000, ignore_index=-1, device=torch.device("cpu"))
    label = torch.tensor([255, -1, 7])[:, None, None]
    logits = torch.zeros(3, 1000, 1, 1)
    logits[0, 255] = logits[1, 0] = logits[2, 9] = 4.0
    found.add({"label": label, "name": list("abc")}, logits, loss=0.0, seconds=0.0)
    counts = found.result(task="t", corruption="fog", severity=5).counts
    assert isinstance(counts, ImageCounts)
    assert counts.rank.tolist() == [0, -1, 8]  # 9, then 0 to 6: equal ones in class order
    assert found.scores()["top1"] == 0.5


def test_logits_that_are_not_finite_are_no_hit() -> None:
    found = record()
    logits = torch.full((1, CLASSES, 1, 1), torch.nan)
    found.add({"label": torch.tensor([[[0]]]), "name": ["a"]}, logits, loss=0.0, seconds=0.0)
    assert found.scores() == {"top1": 0.0, "top5": 0.0, "ece": 0.0}


def test_a_label_outside_the_classes_is_refused_by_name() -> None:
    label = torch.tensor([1, 8])[:, None, None]
    with pytest.raises(SegmillError, match="Image b has the label 8, which is outside the 8"):
        record().add(
            {"label": label, "name": list("ab")}, torch.zeros(2, 8, 1, 1), loss=0.0, seconds=0.0
        )


@pytest.mark.parametrize("classes", [7, 9])
def test_a_model_of_other_classes_is_refused(classes: int) -> None:
    """With more of them a rank would be counted among classes that the data set does not have."""
    (batch, _), *_ = steps(2)
    with pytest.raises(SegmillError, match=rf"has {classes} classes and the data set 8"):
        record().add(batch, torch.zeros(2, classes, 1, 1), loss=0.0, seconds=0.0)


def test_a_map_of_logits_is_refused() -> None:
    batch = {"label": torch.zeros(1, 1, 1, dtype=torch.int64), "name": ["a"]}
    with pytest.raises(SegmillError, match="a map of 2 x 3 logits, and the data set has one label"):
        record().add(batch, torch.zeros(1, 8, 2, 3), loss=0.0, seconds=0.0)


def test_what_processes_saw_is_put_together_in_the_streams_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes; every step has some images of each."""
    (batch, logits), *_ = steps(7)
    shares = [[[0, 1], [4, 5]], [[2, 3], [6]]]  # process, step
    records = [record(), record()]
    for process, of_process in enumerate(shares):
        for images in of_process:
            part = {"label": batch["label"][images], "name": [batch["name"][i] for i in images]}
            seconds = 4.0 * len(images)
            records[process].add(part, logits[images], loss=float(process), seconds=seconds)
    sent: list[Any] = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda _, mine: sent.append(mine))
    for each in records:
        with pytest.raises(ValueError, match="unpack"):  # nothing came back
            each.gather()

    def give(parts: list[Any], mine: Any) -> None:
        parts[:] = sent

    monkeypatch.setattr(distributed, "all_gather_object", give)
    for each in records:
        each._ranks, each._confidences, each.course._steps = [], [], []
    records[0].gather()
    alone = record()
    alone.add(batch, logits, loss=0.0, seconds=14.0)
    together = records[0].result(task="t", corruption="fog", severity=5)
    expected = alone.result(task="t", corruption="fog", severity=5)
    assert together.names == expected.names
    assert together.scores == expected.scores
    assert together.seconds == expected.seconds, "the processes work side by side"
    assert together.loss == pytest.approx(3 / 7)
