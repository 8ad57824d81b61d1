import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate_synthetic
import golden
from segmill.errors import SegmillError
from segmill.evaluation import ConfusionMetric, predict_batch
from segmill.metrics import SCALARS, confusion_matrix, scores
from test_protocol import protocol


def metric() -> ConfusionMetric:
    return ConfusionMetric(num_classes=10, ignore_index=255)


def update_with(ours: ConfusionMetric, pairs: list) -> None:
    for pred, label in pairs:
        ours.update(torch.from_numpy(pred.astype(np.uint8)), torch.from_numpy(label))


def test_scores_equal_mmsegmentation():
    ours = metric()
    update_with(ours, golden.iou_inputs())
    want = golden.component("iou")["mIoU+mDice+mFscore|nan_to_num=None"]["summary"]
    got = ours.compute()
    assert {name: round(100 * got[name], 2) for name in want} == want
    assert set(got) == set(SCALARS)


def test_the_matrix_is_the_sum_of_the_images():
    ours, pairs = metric(), golden.iou_inputs()
    update_with(ours, pairs)
    want = sum(confusion_matrix(label, pred, 10) for pred, label in pairs)
    assert np.array_equal(ours.total().numpy(), want)
    assert ours.total().dtype == torch.int64


def test_reset_forgets():
    ours = metric()
    update_with(ours, golden.iou_inputs())
    ours.reset()
    assert not ours.confusion.any()


def test_predictions_outside_the_classes_are_misses():
    ours = ConfusionMetric(num_classes=2, ignore_index=255)
    ours.update(torch.tensor([0, 2, 1, 200, 200]), torch.tensor([0, 0, 1, 1, 255]))
    assert ours.confusion.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert scores(ours.confusion.numpy())["mIoU"] == 0.5


def test_a_label_outside_the_classes_is_never_dropped_in_silence():
    ours = ConfusionMetric(num_classes=2, ignore_index=255)
    ours.update(torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(SegmillError, match="1 pixels have the label 2"):
        ours.total()


def test_two_processes_count_every_image_once(tmp_path):
    result = tmp_path / "two.json"
    script = Path(evaluate_synthetic.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "2", str(result)],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(result.read_text())
    model = evaluate_synthetic.model()
    total, per_image = np.zeros((7, 7), int), []
    images = evaluate_synthetic.Images()
    for index in range(len(images)):
        item = images[index]
        pred = predict_batch(model, item, protocol())
        confusion = confusion_matrix(item["label"].numpy(), pred.numpy(), 7)
        total += confusion
        per_image.append([index, scores(confusion)["mIoU"]])
    assert two["confusion"] == total.tolist()
    assert two["per_image"] == per_image
