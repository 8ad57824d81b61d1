import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import golden
from segmill.errors import SegmillError
from segmill.metrics import SCALARS, confusion_matrix, confusion_with_misses, scores

CLASSES = 5
maps = arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 4, 255]))
predictions = arrays(np.uint8, (6, 7), elements=st.integers(0, CLASSES - 1))


def golden_confusion() -> np.ndarray:
    return sum(confusion_matrix(label, pred, 10) for pred, label in golden.iou_inputs())


def test_areas_equal_mmsegmentation():
    confusion, areas = golden_confusion(), golden.component("iou")["areas"]
    label, pred, hit = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    assert label.tolist() == areas["label"]
    assert pred.tolist() == areas["pred"]
    assert hit.tolist() == areas["intersect"]
    assert (label + pred - hit).tolist() == areas["union"]


@pytest.mark.parametrize("metrics", ["mIoU", "mDice", "mFscore", "mIoU+mDice+mFscore"])
def test_scores_equal_mmsegmentation(metrics):
    want, got = golden.component("iou")[f"{metrics}|nan_to_num=None"], scores(golden_confusion())
    for name, percent in want["summary"].items():
        assert round(100 * got[name], 2) == percent, name
    for name, values in want["per_class"].items():
        # The golden values are float32 quotients of the same integers.
        np.testing.assert_allclose(got[name], np.array(values, float), rtol=2e-7, err_msg=name)


def test_frequency_weighted_iou_by_hand():
    # Class 0: 3 of 4 label pixels right, one more predicted; class 1: 1 of 2 right.
    got = scores(np.array([[3, 1], [1, 1]]))
    assert got["FWIoU"] == pytest.approx((4 * 3 / 5 + 2 * 1 / 3) / 6)


def test_a_prediction_outside_the_classes_is_a_miss():
    label = np.array([0, 0, 1, 255])
    confusion = confusion_with_misses(label, np.array([0, 2, 1, 2]), 2)
    assert confusion.tolist() == [[1, 0, 1], [0, 1, 0]]
    got = scores(confusion)
    assert got["IoU"].tolist() == [0.5, 1.0]
    assert got["Precision"].tolist() == [1.0, 1.0]
    assert got["aAcc"] == pytest.approx(2 / 3)


def test_without_misses_the_column_changes_no_score():
    pred, label = golden.iou_inputs()[0]
    square = scores(confusion_matrix(label, pred, 10))
    for name, value in scores(confusion_with_misses(label, pred, 10)).items():
        np.testing.assert_array_equal(value, square[name])


def test_a_square_matrix_refuses_predictions_outside_the_classes():
    with pytest.raises(SegmillError, match="1 predictions are outside the 2 classes"):
        confusion_matrix(np.array([0, 0]), np.array([0, 2]), 2)


def test_only_ignored_pixels_give_nan_without_a_warning():
    empty = np.full((3, 3), 255, np.uint8)
    got = scores(confusion_matrix(empty, np.zeros_like(empty), CLASSES))
    assert all(np.isnan(got[name]) for name in SCALARS)


def test_an_absent_class_drops_out_of_the_means_or_counts_as_zero():
    # Class 1 is predicted but never a label; class 2 is neither.
    confusion = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    dropped, zero = (scores(confusion, absent_class=rule) for rule in ("drop", "zero"))
    assert (dropped["mIoU"], zero["mIoU"]) == (0.375, 0.25)
    assert (dropped["mAcc"], zero["mAcc"]) == (0.75, 0.25)
    assert np.array_equal(dropped["IoU"], zero["IoU"], equal_nan=True)
    assert dropped["aAcc"] == zero["aAcc"]


def test_a_label_outside_the_classes_names_the_remedy():
    with pytest.raises(SegmillError, match="label_map"):
        confusion_matrix(np.array([[7]]), np.array([[0]]), CLASSES)


@settings(deadline=None, max_examples=50)
@given(maps, predictions, st.randoms(use_true_random=False))
def test_the_order_of_pixels_does_not_matter(label, pred, random):
    order = np.array(random.sample(range(label.size), label.size))
    shuffled = confusion_matrix(label.ravel()[order], pred.ravel()[order], CLASSES)
    assert np.array_equal(confusion_matrix(label, pred, CLASSES), shuffled)


@settings(deadline=None, max_examples=50)
@given(maps, predictions, predictions)
def test_ignored_pixels_never_count(label, pred, other):
    changed = np.where(label == 255, other, pred)
    confusion = confusion_matrix(label, pred, CLASSES)
    assert np.array_equal(confusion, confusion_matrix(label, changed, CLASSES))
    assert confusion.sum() == (label != 255).sum()


@settings(deadline=None, max_examples=50)
@given(maps, predictions, maps, predictions)
def test_the_matrix_of_two_images_is_the_sum_of_theirs(label, pred, label2, pred2):
    both = confusion_matrix(np.stack([label, label2]), np.stack([pred, pred2]), CLASSES)
    parts = confusion_matrix(label, pred, CLASSES) + confusion_matrix(label2, pred2, CLASSES)
    assert np.array_equal(both, parts)


@settings(deadline=None, max_examples=50)
@given(maps, predictions)
def test_counting_absent_classes_as_zero_never_raises_a_mean(label, pred):
    confusion = confusion_matrix(label, pred, CLASSES)
    dropped, zero = scores(confusion), scores(confusion, absent_class="zero")
    for name in SCALARS:
        assert np.isnan(dropped[name]) or zero[name] <= dropped[name]


@settings(deadline=None, max_examples=50)
@given(maps, predictions)
def test_every_score_is_a_fraction_or_undefined(label, pred):
    for value in scores(confusion_matrix(label, pred, CLASSES)).values():
        values = np.atleast_1d(value)
        assert ((values >= 0) & (values <= 1 + 1e-12) | np.isnan(values)).all()
