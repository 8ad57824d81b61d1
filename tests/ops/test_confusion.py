"""Confusion counts on the device against the portable numpy metric."""

import numpy as np
import pytest
import torch

from golden import iou_inputs
from segmill.errors import SegmillError
from segmill.metrics import confusion_matrix
from segmill.ops.confusion import update_confusion


def test_counts_equal_the_numpy_metric():
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    expected = np.zeros((10, 10), np.int64)
    for pred, label in iou_inputs():
        update_confusion(confusion, torch.from_numpy(label), torch.from_numpy(pred))
        expected += confusion_matrix(label, pred, 10)
    assert np.array_equal(confusion.numpy(), expected)


def test_rows_are_labels_and_ignored_pixels_do_not_count():
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    label = torch.tensor([[0, 0, 2, 255]], dtype=torch.uint8)
    pred = torch.tensor([[1, 1, 0, 2]], dtype=torch.uint8)
    update_confusion(confusion, label, pred)
    assert confusion.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_many_classes_with_uint8_and_int64_mixed():
    confusion = torch.zeros(150, 150, dtype=torch.int64)
    label = torch.full((4, 4), 149, dtype=torch.uint8)
    update_confusion(confusion, label, torch.full((4, 4), 148))
    assert confusion[149, 148] == 16
    assert confusion.sum() == 16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_class_may_be_the_ignored_one(dtype):
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    label = torch.tensor([0, 1, 2, 2], dtype=dtype)
    update_confusion(confusion, label, torch.tensor([1, 1, 1, 0]), ignore_index=0)
    assert confusion.tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_label_outside_the_classes_raises_and_names_it(dtype):
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    label = torch.tensor([[7]], dtype=dtype)
    with pytest.raises(SegmillError, match="value 7, but there are 3 classes"):
        update_confusion(confusion, label, torch.zeros_like(label))
