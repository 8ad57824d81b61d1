"""Look at every file of a data set before training: all problems at once, and what is in it."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from segmill.data.folder import DataError, FolderDataset
from segmill.data.sample import IGNORE


@dataclass
class DataReport:
    """What the files of one split hold. `sizes` counts (width, height).

    Depth with a `data.depth_range` has 0 for "not measured", and its range is of what is. 8-bit
    depth that is taken as it is (DFormer's files) has a range that includes 0, its nearest value.
    """

    samples: int
    pixels: Int[np.ndarray, " K"]
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    depth_range: tuple[int, int] | None = None  # smallest and largest value of the files
    depth_zero: float | None = None  # share of pixels whose value is 0
    depth_as_it_is: bool = False
    problems: list[str] = field(default_factory=list)


@dataclass
class _Seen:
    """One sample's part of the report."""

    counts: Int[np.ndarray, "256"] | None = None
    size: tuple[int, int] | None = None
    depth: tuple[int, int, int, int] | None = None  # smallest, largest, pixels above 0, pixels
    problems: list[str] = field(default_factory=list)


def check_dataset(
    dataset: FolderDataset, *, every: int = 1, progress: Callable[[int], None] | None = None
) -> DataReport:
    """Decode each `every`-th sample; `progress` is told how many are done."""
    indices = range(0, len(dataset), every)
    report = DataReport(len(indices), np.zeros(len(dataset.classes), np.int64))
    depths: list[tuple[int, int, int, int]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda index: _look_at(dataset, index), indices)
        for done, seen in enumerate(results, start=1):
            _add(report, seen)
            if seen.depth is not None:
                depths.append(seen.depth)
            if progress is not None:
                progress(done)
    report.depth_as_it_is = dataset.depth_range is None
    if depths:
        _add_depths(report, depths)
    return report


def _add_depths(report: DataReport, depths: list[tuple[int, int, int, int]]) -> None:
    low, high, above, pixels = np.array(depths).T
    some = above > 0
    report.depth_zero = float(1 - above.sum() / pixels.sum())
    if report.depth_as_it_is:
        nearest = 0 if report.depth_zero else int(low.min())
        report.depth_range = (nearest, int(high.max()))
    elif some.any():
        report.depth_range = (int(low[some].min()), int(high[some].max()))


def _add(report: DataReport, seen: _Seen) -> None:
    report.problems += seen.problems
    if seen.size is not None:
        report.sizes[seen.size] += 1
    if seen.counts is not None:
        report.pixels += seen.counts[: len(report.pixels)]
        report.ignored += int(seen.counts[IGNORE])


def _look_at(dataset: FolderDataset, index: int) -> _Seen:
    """Every file by itself, so that a bad image does not hide a bad label."""
    seen = _Seen()
    image = _kept(lambda: dataset.read_image(index), seen.problems)
    if image is not None:
        seen.size = (image.shape[1], image.shape[0])
    if "label" in dataset.patterns:
        label = _kept(lambda: dataset.read_label(index), seen.problems)
        if label is not None:
            seen.counts = np.bincount(label.ravel(), minlength=256)
            if image is not None:
                _kept(
                    lambda: dataset.require_same_size(index, "label", label, image), seen.problems
                )
    if "depth" in dataset.patterns:
        _look_at_depth(dataset, index, image, seen)
    return seen


def _look_at_depth(
    dataset: FolderDataset, index: int, image: np.ndarray | None, seen: _Seen
) -> None:
    depth = _kept(lambda: dataset.read_depth(index), seen.problems)
    if depth is None:
        return
    _kept(lambda: dataset.depth_channel(index, depth), seen.problems)
    above = depth[depth > 0]
    low, high = (int(above.min()), int(above.max())) if above.size else (0, 0)
    seen.depth = (low, high, above.size, depth.size)
    if image is not None:
        _kept(lambda: dataset.require_same_size(index, "depth", depth, image), seen.problems)


def _kept(look: Callable[[], np.ndarray | None], problems: list[str]) -> np.ndarray | None:
    try:
        return look()
    except DataError as error:
        problems.append(str(error))
        return None
