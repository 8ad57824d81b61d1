"""TaskData: the corrupted images of every task as a stream of single images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader

from segmill.data.classes import counted_classes
from segmill.data.corruptions import check_corruption
from segmill.data.decode import LabelFormat
from segmill.data.files import DataError
from segmill.data.folder import FolderDataset, depth_keys
from segmill.data.frost_textures import load_frost
from segmill.data.loader import channels_first, forked_loader, unchanged
from segmill.data.sample import Sample
from segmill.data.task_folders import CorruptedWhileRead, TaskFolders
from segmill.data.task_order import order_hash, task_places
from segmill.data.tasks import Task, tasks_of
from segmill.protocol import Protocol
from segmill.tta.record import TaskRecord

TaskSamples = FolderDataset | CorruptedWhileRead


class TaskData:
    """Loaders of a corrupted data set; the keywords are its YAML's keys, `protocol` and `seed`.

    `on_the_fly` corrupts the clean images in the loader's workers; otherwise the images of
    `corrupted` are read. `crop` and `test_scale` are what the protocol refers to. Every process of
    a distributed run gets the same images.
    """

    def __init__(
        self,
        *,
        name: str,
        obtain: str,
        data_root: str | Path,
        image: str | None,
        corrupted: str | None,
        on_the_fly: bool,
        label: str | None,
        depth: str | None,
        depth_range: tuple[float, float] | None,
        splits: Mapping[str, Mapping[str, str]],
        split: str,
        label_map: Mapping[int | str, int | str],
        label_format: LabelFormat,
        classes: str | Path,
        num_classes: int,
        channels: Literal[3, 4],
        generate: Callable[[], None] | None,
        corruptions: Sequence[str],
        severities: Sequence[int],
        frost_dir: str | Path | None,
        test_scale: tuple[int, int] | None,
        crop: tuple[int, int],
        batch_size: int,
        workers: int,
        protocol: Protocol,
        seed: int,
    ) -> None:
        _require_one_image(batch_size)
        _require_one_view(protocol)
        if label is None:
            raise DataError(f"data={name} has no labels (data.label is null): nothing to score by.")
        self.name, self.num_classes, self.channels = name, num_classes, channels
        self.classes, self.workers = counted_classes(classes, num_classes), workers
        self.crop, self.test_scale, self.batch_size = crop, test_scale, batch_size
        self.protocol, self.seed, self.tasks = protocol, seed, tasks_of(corruptions, severities)
        files = depth_keys(depth, depth_range, channels)
        self._folders = TaskFolders(
            name=name,
            obtain=obtain,
            data_root=data_root,
            image=image,
            corrupted=corrupted,
            label=label,
            splits=splits,
            split=split,
            label_map=label_map,
            label_format=label_format,
            classes=self.classes,
            **files,
        )
        self.depth_range = files["depth_range"]
        # A `generate` without `_partial_` has already run when this is called.
        if on_the_fly and generate is not None:
            generate()
        self._samples = self._on_the_fly(frost_dir) if on_the_fly else self._on_disk()
        if not on_the_fly and "{corruption}" not in label:
            self._require_same_names()

    def dataset(self, task: Task) -> TaskSamples:
        """The samples of a task at their original size."""
        return self._samples[task]

    def loader(self, tasks: Sequence[Task], *, limit: int | None) -> DataLoader:
        """One image at a time, shuffled by `seed`; several tasks are mixed into one stream.

        `limit` takes the first images of every task only, also when tasks are mixed. Items: `image`
        (1, C, h, w) under the protocol, `original` (1, C, H, W), `label` (1, H, W), all uint8,
        `name`, `size` (H, W) and `task`, its index.
        """
        if limit is not None and limit < 1:
            raise DataError(f"limit={limit}: it must be 1 or more images, or null for all.")
        samples = [self._samples[task] for task in tasks]
        stream = _Stream(samples, tasks, self._places(tasks, limit), self.protocol)
        return forked_loader(stream, unchanged, workers=self.workers, batch_size=None)

    def new_record(self, device: torch.device) -> TaskRecord:
        """Counts the images of a task that is about to begin."""
        return TaskRecord(num_classes=len(self.classes), protocol=self.protocol, device=device)

    def order_hash(self) -> str:
        """Twelve hex digits of the names of all tasks, in the order they are seen in."""
        return order_hash(
            (task.name, [self._samples[task].name(index) for _, index in places.tolist()])
            for task in self.tasks
            for places in [self._places([task], None)]
        )

    def _places(self, tasks: Sequence[Task], limit: int | None) -> Int[np.ndarray, "N 2"]:
        """(position in `tasks`, index of the sample) of every item."""
        lengths = [len(self._samples[task]) for task in tasks]
        return task_places(lengths, limit=limit, seed=self.seed)

    def _on_the_fly(self, frost_dir: str | Path | None) -> dict[Task, TaskSamples]:
        for task in self.tasks:
            check_corruption(task.corruption, task.severity)
        if any(task.corruption == "frost" for task in self.tasks):
            load_frost(frost_dir)  # once, before the workers are forked
        return {
            task: CorruptedWhileRead(self._folders.clean(task), task, frost_dir)
            for task in self.tasks
        }

    def _on_disk(self) -> dict[Task, TaskSamples]:
        self._folders.require_distinct(self.tasks)
        return {task: self._folders.corrupted(task) for task in self.tasks}

    def _require_same_names(self) -> None:
        """Tasks that share their labels show the same images: a gap would shift the order."""
        found = {task: _names(samples) for task, samples in self._samples.items()}
        every = set().union(*found.values())
        for task, names in found.items():
            dataset = self._samples[task]
            if names != every and isinstance(dataset, FolderDataset):
                self._folders.refuse_gaps(dataset, task, sorted(every - names), len(every))


class _Stream:
    """The items of one or several tasks; `places` says which sample stands where."""

    def __init__(
        self,
        samples: Sequence[TaskSamples],
        tasks: Sequence[Task],
        places: Int[np.ndarray, "N 2"],
        protocol: Protocol,
    ) -> None:
        self._samples, self._tasks, self._places = samples, tasks, places
        self._protocol = protocol

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> dict[str, Any]:
        which, index = self._places[position].tolist()
        return task_item(self._samples[which][index], self._tasks[which], self._protocol)


def task_item(sample: Sample, task: Task, protocol: Protocol) -> dict[str, Any]:
    """One image as both models take it, with its label at the original size."""
    assert sample.label is not None
    (view,) = protocol.inputs(sample.image)
    image = channels_first(view)
    same = view.shape == sample.image.shape
    return {
        "image": image,
        "original": image if same else channels_first(sample.image),
        "label": torch.from_numpy(sample.label[None]),
        "name": sample.name,
        "size": sample.label.shape,
        "task": task.index,
    }


def _names(samples: TaskSamples) -> set[str]:
    return {samples.name(index) for index in range(len(samples))}


def _require_one_image(batch_size: int) -> None:
    if batch_size != 1:
        raise DataError(
            f"data.batch_size={batch_size}: adaptation takes one image at a time, as their sizes "
            "differ. Set data.batch_size=1."
        )


def _require_one_view(protocol: Protocol) -> None:
    if protocol.mode != "whole" or protocol.averages_probabilities:
        raise DataError(
            f"protocol={protocol.name} slides over an image or looks at it several times; "
            "adaptation learns from one view of the whole image. Set protocol=whole."
        )
