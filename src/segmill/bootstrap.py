"""Paired bootstrap: how sure a difference in mIoU or top-1 is, given the images that were scored.

Images are drawn with replacement, by name: an image that is drawn twice counts twice in every task
that it occurs in, under both methods. The score is then read off what the drawn images sum up to
(Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, percentile interval). The interval
says nothing about other seeds, other orders of the images or other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from segmill.errors import SegmillError
from segmill.tta.results import MethodResult

LEVEL = 0.95
RESAMPLES = 2000


class Interval(NamedTuple):
    """A difference and where it lies; fractions. No bounds (NaN) where a single image is drawn."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is sure at the interval's level."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Method minus source: of every task's score, and of the mean over the tasks."""

    tasks: tuple[Interval, ...]
    mean: Interval


def compare(
    methods: Sequence[MethodResult],
    source: MethodResult,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> list[Comparison]:
    """Compare each method with `source`, on the same resamples of the same images."""
    for method in methods:
        check_same_images(method, source)
    names = sorted({name for task in source.tasks for name in task.names})
    weights = draw_weights(len(names), resamples=resamples, seed=seed)
    reference = resampled_scores(source, names, weights)
    found = []
    for method in methods:
        drawn = resampled_scores(method, names, weights) - reference
        pairs = zip(method.tasks, source.tasks, strict=True)
        exact = np.array([ours.score - theirs.score for ours, theirs in pairs])
        tasks = tuple(
            _interval(float(difference), column, names, level)
            for difference, column in zip(exact, drawn.T, strict=True)
        )
        mean = _interval(float(exact.mean()), drawn.mean(axis=1), names, level)
        found.append(Comparison(tasks, mean))
    return found


def draw_weights(images: int, *, resamples: int, seed: int) -> Float[np.ndarray, "R U"]:
    """How often each of the images is drawn in each resample."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    return drawn.astype(np.float64)  # products of counts below 2**53 are exact


def resampled_scores(
    result: MethodResult, names: Sequence[str], weights: Float[np.ndarray, "R U"]
) -> Float[np.ndarray, "R T"]:
    """The headline of every task under every resample of the images `names`."""
    position = {name: index for index, name in enumerate(names)}
    columns = []
    for task in result.tasks:
        each = task.counts.sums()
        where = np.array([position[name] for name in task.names], dtype=np.int64)
        by_name = np.zeros((len(names), each.shape[1]))
        np.add.at(by_name, where, each)
        columns.append(task.counts.headline_of(weights @ by_name))
    return np.stack(columns, axis=1)


def check_same_images(method: MethodResult, source: MethodResult) -> None:
    """Refuse to pair results that were not made from the same images in the same order."""
    advice = "A paired comparison needs the same images: run both in one `segmill adapt`."
    ours, theirs = ([task.task for task in each.tasks] for each in (method, source))
    if ours != theirs:
        raise SegmillError(
            f"{method.name} has the tasks {', '.join(ours) or '(none)'}; {source.name} has "
            f"{', '.join(theirs) or '(none)'}. {advice}"
        )
    for mine, other in zip(method.tasks, source.tasks, strict=True):
        if mine.names != other.names:
            same = sorted(mine.names) == sorted(other.names)
            raise SegmillError(
                f"Task {mine.task}: {method.name} saw {len(mine.names)} images and {source.name} "
                f"{len(other.names)}, {'in another order' if same else 'not the same ones'}. "
                f"{advice}"
            )
    if method.order != source.order:
        raise SegmillError(
            f"{method.name} has the order {method.order}, {source.name} {source.order}. {advice}"
        )


def _interval(
    difference: float, drawn: Float[np.ndarray, " R"], names: Sequence[str], level: float
) -> Interval:
    drawn = drawn[~np.isnan(drawn)]  # a resample may hold no labelled pixel
    if len(names) < 2 or not len(drawn):
        return Interval(difference, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(difference, float(low), float(high))
