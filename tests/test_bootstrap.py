"""The paired bootstrap: exact where it can be, and right as often as it says."""

from itertools import product

import numpy as np
import pytest

from segmill.bootstrap import compare, draw_weights, resampled_scores
from segmill.errors import SegmillError
from segmill.metrics import scores
from segmill.tta.counts import ImageCounts, PixelCounts, areas_of, miou_of_areas
from segmill.tta.results import MethodResult, TaskResult


def method(name, *tasks, names=None, order="abc"):
    """Each task is a list of per-image confusion matrices."""
    return MethodResult(
        name=name,
        order=order,
        tasks=tuple(
            TaskResult(
                task=f"{index:02d}_fog_5",
                corruption="fog",
                severity=5,
                names=names or tuple(f"image{number}" for number in range(len(confusions))),
                counts=PixelCounts(
                    areas=np.stack([areas_of(each) for each in confusions]),
                    confusion=np.sum(confusions, axis=0),
                ),
                seconds=0.1,
                peak_memory=0,
                loss=0.0,
            )
            for index, confusions in enumerate(tasks, start=1)
        ),
    )


def random_confusions(rng, images, classes=3):
    """Some classes are absent from some images, one from nearly all."""
    present = rng.random((images, classes, 1)) < [[0.9]] * (classes - 1) + [[0.1]]
    return list(rng.integers(0, 40, (images, classes, classes)) * present)


def of_ten(hits):
    """One class, ten pixels an image, `hits` of them found and the others no class at all."""
    return [np.array([[hit, 10 - hit]]) for hit in hits]


def test_identical_results_differ_by_exactly_nothing():
    confusions = random_confusions(np.random.default_rng(0), 20)
    (found,) = compare([method("tent", confusions)], method("source", confusions), seed=0)
    assert found.mean == found.tasks[0] == (0, 0, 0)
    assert not found.mean.excludes_zero


def test_a_gain_on_every_image_excludes_zero():
    found = compare(
        [method("up", of_ten([6, 7])), method("down", of_ten([3, 4]))],
        method("source", of_ten([5, 6])),
        seed=0,
    )
    assert [each.mean.excludes_zero for each in found] == [True, True]
    assert found[0].mean.low > 0 > found[1].mean.high


def test_two_images_by_hand():
    # Drawn (a, a), (a, b), (b, b) with probability 1/4, 1/2, 1/4; differences 0.1, 0.3, 0.5.
    found = compare(
        [method("tent", of_ten([3, 8]))],
        method("source", of_ten([2, 3])),
        seed=0,
        resamples=4000,
        level=0.4,  # between the 30th and the 70th of a hundred: both are 0.3
    )[0].mean
    np.testing.assert_allclose(found, [0.3, 0.3, 0.3], atol=1e-12)  # 0.3 is no binary number
    wide = compare(
        [method("tent", of_ten([3, 8]))], method("source", of_ten([2, 3])), seed=0, level=0.9
    )[0].mean
    np.testing.assert_allclose(wide, [0.3, 0.1, 0.5], atol=1e-12)


def test_an_image_is_drawn_in_all_tasks_together():
    # The gains of the two tasks cancel image by image, so the mean has no spread at all.
    source = method("source", of_ten([5, 5, 5]), of_ten([5, 5, 5]))
    other = method("tent", of_ten([3, 5, 7]), of_ten([7, 5, 3]))
    (found,) = compare([other], source, seed=0)
    np.testing.assert_allclose(found.mean, [0, 0, 0], atol=1e-12)  # sums of tenths
    assert found.tasks[0].high > 0.1


def test_an_image_that_occurs_twice_in_one_stream_is_drawn_as_one():
    # The same: two corruptions of every image, in one mixed stream.
    names = ("a", "b", "c", "c", "b", "a")
    source = method("source", of_ten([5] * 6), names=names)
    other = method("tent", of_ten([3, 5, 7, 3, 5, 7]), names=names)
    (found,) = compare([other], source, seed=0)
    np.testing.assert_allclose(found.mean, [0, 0, 0], atol=1e-12)


def test_matrix_products_equal_a_loop_over_resamples():
    rng = np.random.default_rng(1)
    result = method("tent", random_confusions(rng, 7), random_confusions(rng, 7))
    names = [f"image{number}" for number in range(7)]
    weights = draw_weights(7, resamples=50, seed=3)
    assert (weights.sum(axis=1) == 7).all()
    fast = resampled_scores(result, names, weights)
    areas = np.stack([task.counts.areas for task in result.tasks])
    for resample, task in product(range(50), range(2)):
        drawn = np.repeat(np.arange(7), weights[resample].astype(int))
        slow = miou_of_areas(areas[task][drawn].sum(axis=0)[None])
        assert fast[resample, task] == slow[0]


def of_images(name, right):
    """One task of classification; `right` says of every image whether it was recognised."""
    counts = ImageCounts(rank=np.where(right, 0, 3), confidence=np.full(len(right), 0.5))
    task = TaskResult(
        task="01_fog_5", corruption="fog", severity=5, counts=counts, seconds=0.1, peak_memory=0,
        loss=0.0, names=tuple(f"image{number}" for number in range(len(right))),
    )  # fmt: skip
    return MethodResult(name=name, order="abc", tasks=(task,))


def test_accuracy_is_compared_image_by_image():
    rng = np.random.default_rng(5)
    before = rng.random(200) < 0.5
    after = before | (rng.random(200) < 0.1)
    (found,) = compare([of_images("tent", after)], of_images("source", before), seed=0)
    gain = after.astype(float) - before
    drawn = rng.choice(gain, (2000, 200)).mean(axis=1)
    assert found.mean.difference == pytest.approx(gain.mean())
    # The same percentiles from other draws of 2000; their own spread is 0.001.
    np.testing.assert_allclose(found.mean[1:], np.quantile(drawn, [0.025, 0.975]), atol=0.005)
    assert found.mean.excludes_zero


def test_miou_of_areas_is_that_of_the_confusion_matrix():
    for seed in range(20):
        confusion = sum(random_confusions(np.random.default_rng(seed), 2))
        # Both add at most three quotients, possibly in another order.
        np.testing.assert_allclose(
            miou_of_areas(areas_of(confusion)[None])[0], scores(confusion)["mIoU"], rtol=1e-15
        )


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held, trials = 0, 200
    for _ in range(trials):
        before = rng.integers(2, 7, 60)  # mean 4 of 10
        after = before + rng.integers(-1, 3, 60)  # 0.5 more
        found = compare(
            [method("tent", of_ten(after))],
            method("source", of_ten(before)),
            seed=int(rng.integers(1 << 31)),
            resamples=300,
        )[0].mean
        held += found.low <= 0.05 <= found.high
    # 190 expected; the standard deviation of 200 draws at 0.95 is 3.1.
    assert 180 <= held <= 199


def test_the_seed_decides():
    rng = np.random.default_rng(2)
    source, other = (method(name, random_confusions(rng, 9)) for name in ("source", "tent"))
    first, again, another = (compare([other], source, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != another


def test_one_image_has_no_interval():
    (found,) = compare([method("tent", of_ten([6]))], method("source", of_ten([5])), seed=0)
    assert found.mean.difference == pytest.approx(0.1)
    assert np.isnan(found.mean.low)
    assert not found.mean.excludes_zero


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (method("tent", of_ten([1, 2]), names=("b", "a")), "in another order"),
        (method("tent", of_ten([1, 2]), names=("a", "c")), "not the same ones"),
        (method("tent", of_ten([1]), names=("a",)), "saw 1 images and source 2"),
        (method("tent", of_ten([1, 2]), of_ten([1, 2]), names=("a", "b")), "has the tasks"),
        (method("tent", of_ten([1, 2]), names=("a", "b"), order="xyz"), "the order xyz"),
    ],
)
def test_results_of_other_images_are_refused(other, said):
    source = method("source", of_ten([1, 2]), names=("a", "b"))
    with pytest.raises(SegmillError, match=f"{said}.*the same images"):
        compare([other], source, seed=0)
