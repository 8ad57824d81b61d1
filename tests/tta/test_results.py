"""Results of adaptation: scores, areas, and files that an interrupted comparison goes on from."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from segmill.metrics import confusion_with_misses, scores
from segmill.tta.counts import ImageCounts, PixelCounts, areas_of, calibration_error
from segmill.tta.results import MethodResult, TaskResult, load_task, save_task, write_json


def pixels(confusions, **changes):
    parts = {
        "areas": np.stack([areas_of(each) for each in confusions]),
        "confusion": np.sum(confusions, axis=0),
    }
    return PixelCounts(**{**parts, **changes})


def task_result(confusions, **changes):
    """One image a confusion matrix, unless `changes` bring other counts."""
    parts = {
        "task": "06_motion_blur_5",
        "corruption": "motion_blur",
        "severity": 5,
        "names": tuple(f"street/{index}" for index in range(len(confusions))),
        **({} if "counts" in changes else {"counts": pixels(confusions)}),
        "seconds": 0.5,
        "peak_memory": 0,
        "loss": 1.5,
    }
    return TaskResult(**{**parts, **changes})


FIRST = np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])  # IoU 0.75, 0.5, absent
SECOND = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 3]])


def test_areas_are_hits_labels_and_predictions():
    assert areas_of(FIRST).tolist() == [[6, 2, 0], [8, 2, 0], [6, 4, 0]]


def test_a_prediction_outside_the_classes_is_in_the_area_of_its_label_only():
    label, pred = np.array([0, 0, 1, 255]), np.array([0, 9, 1, 1])
    confusion = confusion_with_misses(label, pred, 2)
    assert areas_of(confusion).tolist() == [[1, 1], [2, 1], [1, 1]]


def test_scores_are_those_of_the_confusion_matrix_and_absent_classes_drop_out():
    result = task_result([FIRST])
    assert result.score == 0.625
    assert result.scores["mAcc"] == scores(FIRST)["mAcc"] == 0.875


def test_the_score_of_a_task_is_no_mean_over_images():
    result = task_result([FIRST, SECOND])
    assert result.score == scores(FIRST + SECOND)["mIoU"]
    assert result.score != pytest.approx(np.mean([scores(FIRST)["mIoU"], scores(SECOND)["mIoU"]]))


def test_areas_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="add up"):
        pixels([FIRST], confusion=SECOND)


def test_a_method_averages_over_tasks_and_its_seconds_over_images():
    short = task_result([FIRST], seconds=4.0, peak_memory=7)
    long = task_result([FIRST, FIRST, SECOND], seconds=1.0, peak_memory=9)
    method = MethodResult(name="tent", tasks=(short, long), order="abc")
    assert method.score == (short.score + long.score) / 2
    assert method.seconds == 7 / 4
    assert (method.images, method.peak_memory) == (4, 9)


def test_a_saved_task_is_read_as_it_was(tmp_path):
    saved = task_result([FIRST, SECOND], names=("雾/a", "b"), peak_memory=3 << 32, loss=math.nan)
    save_task(tmp_path, saved)
    read = load_task(tmp_path, saved.task)
    assert read is not None
    for key in ("task", "corruption", "severity", "names", "seconds", "peak_memory"):
        assert getattr(read, key) == getattr(saved, key)
    assert math.isnan(read.loss)
    assert (read.counts.areas == saved.counts.areas).all()
    assert (read.counts.confusion == saved.counts.confusion).all()


def image_counts():
    return ImageCounts(
        rank=np.array([0, 4, 7, -1, 0]), confidence=np.array([1, 0.5, 0.3, 0.9, 0.6])
    )


def test_classification_is_saved_and_read_alike(tmp_path):
    saved = task_result([], counts=image_counts(), names=tuple("abcde"))
    assert saved.score == 0.5
    assert saved.scores["top5"] == 0.75
    save_task(tmp_path, saved)
    read = load_task(tmp_path, saved.task)
    assert isinstance(read.counts, ImageCounts)
    assert read.counts.rank.tolist() == saved.counts.rank.tolist()
    assert read.scores == saved.scores
    assert read.names == saved.names


def test_the_json_of_classification_has_its_scores_and_no_class(tmp_path):
    task = task_result([], counts=image_counts(), names=tuple("abcde"))
    write_json(tmp_path / "results.json", [MethodResult(name="bn", tasks=(task,), order="abc")])
    (method,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["methods"]
    assert set(method["mean"]) == {"top1", "top5", "ece"}
    assert method["tasks"][0]["top1"] == 0.5
    assert "IoU" not in method["tasks"][0]


def test_a_task_without_labels_has_no_score():
    counts = ImageCounts(rank=np.array([-1]), confidence=np.array([0.5]))
    assert all(math.isnan(value) for value in counts.scores().values())
    assert math.isnan(counts.headline_of(counts.sums())[0])


def test_bins_of_calibration_are_closed_above():
    # 1/15 lies in the first bin, so both images share it.
    error = calibration_error(np.array([1 / 15, 0.5 / 15]), np.array([True, False]))
    assert error == pytest.approx(0.5 - 0.05)


def test_a_task_that_was_not_finished_is_none(tmp_path):
    assert load_task(tmp_path, "01_gaussian_noise_5") is None


def test_no_half_a_file_is_left(tmp_path, monkeypatch):
    save_task(tmp_path, task_result([FIRST]))
    monkeypatch.setattr("pathlib.Path.replace", _full_disk)
    with pytest.raises(OSError, match="full"):
        save_task(tmp_path, task_result([SECOND]))
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["06_motion_blur_5.npz"]
    assert load_task(tmp_path, "06_motion_blur_5").score == 0.625


def test_the_json_holds_fractions_and_null_for_what_is_undefined(tmp_path):
    task = replace(task_result([FIRST]), loss=math.nan)
    write_json(tmp_path / "results.json", [MethodResult(name="bn", tasks=(task,), order="abc")])
    (method,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["methods"]
    assert (method["method"], method["order"]) == ("bn", "abc")
    assert method["mean"]["mIoU"] == 0.625
    assert method["peak_memory_bytes"] is None
    assert method["tasks"][0]["loss"] is None
    assert method["tasks"][0]["IoU"] == [0.75, 0.5, None]


def _full_disk(path, target):
    raise OSError("the disk is full")
