"""Which images belong to a task: its corrupted folder, or the clean images corrupted while read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from segmill.data.classes import Classes
from segmill.data.corruptions import corrupt, corruption_seed
from segmill.data.decode import LabelFormat
from segmill.data.files import AbsentError, DataError
from segmill.data.folder import FolderDataset
from segmill.data.sample import Sample
from segmill.data.tasks import Task

_PLACES = {"corruption": "{corruption}", "severity": "{severity}"}


class TaskFolders:
    """The clean and the corrupted images of every task, with their labels.

    The patterns are FolderDataset's and may also hold {corruption} and {severity}. `obtain` says
    where the files come from; it is printed where they are missing.
    """

    def __init__(
        self,
        *,
        name: str,
        obtain: str,
        data_root: str | Path,
        image: str | None,
        corrupted: str | None,
        label: str | None,
        depth: str | None,
        depth_range: tuple[float, float] | None,
        splits: Mapping[str, Mapping[str, str]],
        split: str,
        label_map: Mapping[int | str, int | str],
        label_format: LabelFormat,
        classes: Classes,
    ) -> None:
        self.name, self.obtain, self.data_root = name, obtain, data_root
        self._image, self._corrupted = image, corrupted
        self._split_folder = splits.get(split, {}).get("folder", split)
        self._patterns: dict[str, str | None] = {"label": label, "depth": depth}
        self._others: dict[str, Any] = {"depth_range": depth_range, "classes": classes}
        self._others |= {"splits": splits, "split": split}
        self._others |= {"label_map": label_map, "label_format": label_format}
        self._opened: dict[tuple[str | None, ...], FolderDataset] = {}

    def clean(self, task: Task) -> FolderDataset:
        """The images before their corruption."""
        return self._dataset("image", self.require_clean(), task)

    def require_clean(self) -> str:
        """The pattern of the clean images; refuse a data set without them."""
        if self._image is None:
            raise DataError(
                f"data={self.name} has no clean images (data.image is null), so there is nothing "
                "to corrupt. Its images are used as they are: "
                f"segmill adapt data={self.name} data.on_the_fly=false."
            )
        return self._image

    def corrupted_path(self, clean: FolderDataset, index: int, task: Task) -> str:
        """Where the task's image of a clean sample belongs, below the root."""
        assert self._corrupted is not None
        pattern = filled(self._corrupted, task).replace("{split}", self._split_folder)
        return pattern.replace("{name}", clean.name(index))

    def corrupted(self, task: Task) -> FolderDataset:
        """The images of the task's own folder; a folder with gaps is refused."""
        assert self._corrupted is not None  # see require_distinct
        dataset = self._dataset("corrupted", self._corrupted, task)
        absent = dataset.without_image()
        if absent:
            self.refuse_gaps(dataset, task, absent, len(dataset))
        return dataset

    def require_distinct(self, tasks: Sequence[Task]) -> None:
        """Refuse a pattern of corrupted images that gives several tasks the same files."""
        if self._corrupted is None or self._corrupted.count("{name}") != 1:
            raise DataError(
                f"data={self.name} does not say where corrupted images lie: data.corrupted is "
                f"{self._corrupted}. Give a pattern like c/{{corruption}}/{{severity}}/{{name}}.png"
                ", or corrupt clean images while they are read: data.on_the_fly=true."
            )
        for field, place in _PLACES.items():
            values = {getattr(task, field) for task in tasks}
            if len(values) > 1 and place not in self._corrupted:
                raise DataError(
                    f"data.corrupted={self._corrupted} gives every {field} the same files, but "
                    f"there are {len(values)} ({', '.join(map(str, sorted(values)))}). Choose one, "
                    f"or put {place} into the pattern."
                )

    def refuse_gaps(
        self, dataset: FolderDataset, task: Task, absent: Sequence[str], expected: int
    ) -> None:
        """Say which images a task lacks."""
        first = dataset.files.where(dataset.patterns["image"].replace("{name}", absent[0]))
        raise DataError(
            f"data={self.name}: the task {task.name} lacks {len(absent)} of {expected} images, "
            f"the first one {first}. {self.obtain}{self._make('corrupted')}"
        )

    def _dataset(
        self, key: Literal["image", "corrupted"], pattern: str, task: Task
    ) -> FolderDataset:
        files: dict[str, str | None] = {"image": filled(pattern, task)}
        for kind, each in self._patterns.items():
            files[kind] = None if each is None else filled(each, task)
        shared = tuple(files.values())
        if shared not in self._opened:  # clean images are listed once for all tasks
            try:
                self._opened[shared] = FolderDataset(
                    **{"data_root": self.data_root, **files, **self._others}
                )
            except AbsentError as error:
                raise DataError(self._absent(key, pattern, task, error)) from None
        return self._opened[shared]

    def _absent(self, key: str, pattern: str, task: Task, error: AbsentError) -> str:
        if "{name}" not in error.where:  # the root itself
            folder = filled(pattern, task).replace("{split}", self._split_folder)
            wanted = Path(error.where) / folder.rpartition("/")[0]
            found = f"there is no folder {error.where} (wanted: {wanted})"
        else:
            folder, _, file = error.where.rpartition("/")
            found = f"the folder {folder} does not exist or has no {file.replace('{name}', '*')}"
        return f"data={self.name}, task {task.name}: {found}. {self._remedy(key, pattern)}"

    def _remedy(self, key: str, pattern: str) -> str:
        return (
            f"Set data.data_root (now {self.data_root}) to the folder where {pattern} "
            f"(data.{key}) begins. {self.obtain}{self._make(key)}"
        )

    def _make(self, key: str) -> str:
        if key != "corrupted" or self._image is None:
            return ""
        return (
            f" To make them of clean images: segmill corrupt data={self.name} data.data_root=CLEAN "
            "out=DIR."
        )


class CorruptedWhileRead:
    """The clean samples of a task, each corrupted with the draws of its own name."""

    def __init__(
        self, samples: FolderDataset, task: Task, frost_dir: str | os.PathLike[str] | None
    ) -> None:
        self._samples, self._task, self._frost_dir = samples, task, frost_dir

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        sample = self._samples[index]
        # Colour alone: a depth sensor is another instrument, which what spoils colour leaves alone.
        image = corrupted(sample.image[..., :3], sample.name, self._task, self._frost_dir)
        if sample.image.shape[2] > 3:
            image = np.dstack([image, sample.image[..., 3:]])
        return Sample(image, sample.label, sample.name)

    def name(self, index: int) -> str:
        """What stands for {name}."""
        return self._samples.name(index)


def corrupted(
    image: UInt8[np.ndarray, "H W 3"],
    name: str,
    task: Task,
    frost_dir: str | os.PathLike[str] | None,
) -> UInt8[np.ndarray, "H W 3"]:
    """The image called `name` as the task shows it, the same on disk and on the fly."""
    seed = corruption_seed(name, task.corruption, task.severity)
    image = np.ascontiguousarray(image)
    return corrupt(image, task.corruption, task.severity, seed, frost_dir)


def filled(pattern: str, task: Task) -> str:
    """A pattern with the task's corruption and severity."""
    named = pattern.replace(_PLACES["corruption"], task.corruption)
    return named.replace(_PLACES["severity"], str(task.severity))
