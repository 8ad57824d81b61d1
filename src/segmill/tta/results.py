"""What a comparison of adaptation methods leaves: counts per task and per image, and their scores.

What is counted is a matter of the kind of task (counts.py); all else is the same for every kind.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmill.files import write_whole
from segmill.tta.counts import Counts, counts_from

SOURCE = "source"  # the method that all others are compared with: the model as it was trained
FOLDER = "tasks"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One method on one task. `names` are in the order in which the images were seen.

    A name may occur more than once: in a stream of all corruptions every image does. `seconds` is
    per image; `peak_memory` is in bytes, 0 where it was not measured; `loss` is a mean.
    """

    task: str
    corruption: str
    severity: int
    names: tuple[str, ...]
    counts: Counts
    seconds: float
    peak_memory: int
    loss: float

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.counts), f"{self.task}: a name and counts of each image"

    @property
    def scores(self) -> dict[str, float]:
        """All scalars of its kind of task, as fractions; NaN where nothing is labelled."""
        return self.counts.scores()

    @property
    def score(self) -> float:
        """The headline: mIoU, or top1."""
        return self.scores[self.counts.headline]


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method on all tasks, in task order. `order` says which images, in which order."""

    name: str
    tasks: tuple[TaskResult, ...]
    order: str

    @property
    def scores(self) -> dict[str, float]:
        """Each scalar's mean over the tasks, all counting alike."""
        each = [task.scores for task in self.tasks]
        return {name: float(np.mean([one[name] for one in each])) for name in each[0]}

    @property
    def counts(self) -> Counts:
        """Of the first task: its names of scores are those of all."""
        return self.tasks[0].counts

    @property
    def score(self) -> float:
        """The headline's mean over the tasks."""
        return self.scores[self.counts.headline]

    @property
    def images(self) -> int:
        """Images seen, over all tasks."""
        return sum(len(task.names) for task in self.tasks)

    @property
    def seconds(self) -> float:
        """Per image, over all tasks."""
        total = sum(task.seconds * len(task.names) for task in self.tasks)
        return total / max(self.images, 1)

    @property
    def peak_memory(self) -> int:
        """Bytes, the most of all tasks; 0 where it was not measured."""
        return max((task.peak_memory for task in self.tasks), default=0)


def save_task(folder: Path, result: TaskResult) -> None:
    """Write FOLDER/tasks/TASK.npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        allow_pickle=False,
        corruption=np.array(result.corruption),
        severity=np.array(result.severity),
        names=np.array(result.names, dtype=np.str_),
        **result.counts.arrays(),
        seconds=np.array(result.seconds),
        peak_memory=np.array(result.peak_memory, dtype=np.int64),
        loss=np.array(result.loss),
    )
    write_whole(_file(folder, result.task), buffer.getvalue())


def load_task(folder: Path, task: str) -> TaskResult | None:
    """Read what `save_task` wrote; None if the task was not finished."""
    path = _file(folder, task)
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return TaskResult(
            task=task,
            corruption=str(arrays["corruption"]),
            severity=int(arrays["severity"]),
            names=tuple(arrays["names"].tolist()),
            counts=counts_from(arrays),
            seconds=float(arrays["seconds"]),
            peak_memory=int(arrays["peak_memory"]),
            loss=float(arrays["loss"]),
        )


def write_json(path: Path, results: Sequence[MethodResult]) -> None:
    """Scores, times and memory of all methods as text; undefined or unmeasured is null."""
    content = {"methods": [_facts_of_method(result) for result in results]}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def _file(folder: Path, task: str) -> Path:
    return folder / FOLDER / f"{task}.npz"


def _facts_of_method(result: MethodResult) -> dict[str, Any]:
    return {
        "method": result.name,
        "order": result.order,
        "images": result.images,
        "seconds_per_image": result.seconds,
        "peak_memory_bytes": result.peak_memory or None,
        "mean": _defined(result.scores),
        "tasks": [_facts_of_task(task) for task in result.tasks],
    }


def _facts_of_task(task: TaskResult) -> dict[str, Any]:
    by_class = task.counts.by_class()
    return {
        "task": task.task,
        "corruption": task.corruption,
        "severity": task.severity,
        "images": len(task.names),
        "seconds_per_image": task.seconds,
        "peak_memory_bytes": task.peak_memory or None,
        **_defined({"loss": task.loss, **task.scores}),
        **{
            name: [None if math.isnan(value) else value for value in values]
            for name, values in by_class.items()
        },
    }


def _defined(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
