"""ClassificationTaskData: the corrupted images of every task in batches, one label for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader

from segmill.data.classes import Classes, coloured_classes, read_classes
from segmill.data.corruptions import check_corruption
from segmill.data.files import DataError
from segmill.data.frost_textures import load_frost
from segmill.data.image_batches import ImageBatches
from segmill.data.image_view import ImageView
from segmill.data.labelled_image import NO_LABEL, LabelledImages
from segmill.data.loader import channels_first, forked_loader, place_of_process
from segmill.data.task_folders import corrupted
from segmill.data.task_order import order_hash, task_places
from segmill.data.tasks import Task, tasks_of
from segmill.protocol import Protocol as EvaluationProtocol
from segmill.tta.classification_record import ClassificationRecord

CLEAN = "clean"  # the task without a corruption, of severity 0


@runtime_checkable
class ImageSource(Protocol):
    """Where the images of a task come from: `ClassFolders` or `DigitsOfTasks`."""

    def require_tasks(self, tasks: Sequence[Task], *, on_the_fly: bool) -> None:
        """Refuse tasks that its files are not made for."""
        ...

    def class_names(self, task: Task) -> tuple[str, ...]:
        """The classes of a task's images, in their order."""
        ...

    def images(self, task: Task, names: Sequence[str]) -> LabelledImages:
        """The images of a task, whose classes have to be `names`."""
        ...


@dataclass(frozen=True)
class Views:
    """What a task shows of an image: both models' views, corrupted if that is not done on disk."""

    view: ImageView | None  # None: images are taken as they are
    on_the_fly: bool
    frost_dir: str | Path | None

    def item(self, images: LabelledImages, index: int, task: Task) -> dict[str, Any]:
        """One image as a batch of one."""
        found = images[index]
        image = found.image if self.view is None else self.view.classifier(found.image)
        if self.on_the_fly and task.corruption != CLEAN:
            image = corrupted(image, found.name, task, self.frost_dir)
        original = image
        if self.view is not None and self.view.guide_size is not None:
            original = self.view.guide(found.image)
        first = channels_first(image)
        return {
            "image": first,
            "original": first if original is image else channels_first(original),
            "label": torch.tensor([[[found.label]]]),
            "name": found.name,
            "task": task.index,
        }


class ClassificationTaskData:
    """Loaders of a corrupted data set; the keywords are its YAML's keys, `protocol` and `seed`.

    `on_the_fly` corrupts the classifier's view of clean images in the loader's workers, as
    ImageNet-C was made. `batch_size` is that of one process. `data_root` is what `source` refers
    to; `crop` and `test_scale` are there for those who ask for an image's size. The classes are
    those of the file `classes` if there are `num_classes` of them (a miniature has fewer), else
    the names that the source finds.
    """

    depth_range = None

    def __init__(
        self,
        *,
        name: str,
        data_root: str | Path | None,
        source: ImageSource,
        on_the_fly: bool,
        view: ImageView | None,
        classes: str | Path,
        num_classes: int,
        channels: Literal[3],
        corruptions: Sequence[str],
        severities: Sequence[int],
        frost_dir: str | Path | None,
        test_scale: tuple[int, int] | None,
        crop: tuple[int, int],
        batch_size: int,
        workers: int,
        protocol: EvaluationProtocol,
        seed: int,
    ) -> None:
        _require_images_as_they_are(protocol)
        if batch_size < 1:
            raise DataError(f"data.batch_size={batch_size} should be 1 or more images.")
        self.name, self.data_root, self.source = name, data_root, source
        self.num_classes, self.channels, self.workers = num_classes, channels, workers
        self.crop, self.test_scale, self.protocol, self.seed = crop, test_scale, protocol, seed
        self.batch_size = batch_size
        self.tasks = tasks_of(corruptions, severities)
        self._views = Views(view, on_the_fly, frost_dir)
        self._require_possible()
        self.classes = self._classes(classes)
        self._images = {task: source.images(task, self.classes.names) for task in self.tasks}
        self._require_same_images()

    def dataset(self, task: Task) -> LabelledImages:
        """The images of a task as they are on disk."""
        return self._images[task]

    def loader(
        self,
        tasks: Sequence[Task],
        *,
        limit: int | None,
        share: Literal["classes", "images"] = "classes",
    ) -> DataLoader:
        """Batches shuffled by `seed`; several tasks are mixed into one stream.

        `limit` takes the first images of every task only, also when tasks are mixed. `share`
        images: every process has others; classes: all have the same. Batches: `image`
        (B, 3, h, w) as the classifier sees it, `original` (B, 3, H, W) for the guide, both uint8,
        `label` (B, 1, 1) int64, `name`, `size` (1, 1) and `task`, the index of each.
        """
        if limit is not None and limit < 1:
            raise DataError(f"limit={limit}: it must be 1 or more images, or null for all.")
        places = self._places(tasks, limit)
        _, world = place_of_process()
        if share == "images" and len(places) < world:
            raise DataError(
                f"{len(places)} images cannot be shared by {world} processes. Take more images "
                "(limit), or fewer processes (trainer.devices)."
            )
        batches = ImageBatches(
            count=len(places),
            batch_size=self.batch_size,
            place=place_of_process if share == "images" else _alone,
        )
        stream = _Stream([self._images[task] for task in tasks], tasks, places, self._views)
        return forked_loader(stream, as_batch, workers=self.workers, batch_sampler=batches)

    def new_record(self, device: torch.device) -> ClassificationRecord:
        """Counts the images of a task that is about to begin."""
        return ClassificationRecord(
            num_classes=len(self.classes), ignore_index=NO_LABEL, device=device
        )

    def order_hash(self) -> str:
        """Twelve hex digits of the names of all tasks, in the order they are seen in."""
        return order_hash(
            (task.name, [self._images[task].name(index) for _, index in places.tolist()])
            for task in self.tasks
            for places in [self._places([task], None)]
        )

    def _places(self, tasks: Sequence[Task], limit: int | None) -> Int[np.ndarray, "N 2"]:
        lengths = [len(self._images[task]) for task in tasks]
        return task_places(lengths, limit=limit, seed=self.seed)

    def _require_possible(self) -> None:
        """What no file can mend."""
        view, on_the_fly = self._views.view, self._views.on_the_fly
        tasks = [task for task in self.tasks if task.corruption != CLEAN]
        self.source.require_tasks(self.tasks, on_the_fly=on_the_fly and bool(tasks))
        if on_the_fly and tasks and view is not None and view.guide_size is not None:
            raise DataError(
                "data.on_the_fly corrupts the classifier's view, and data.view.guide_size="
                f"{view.guide_size} would give the guide a clean one. Set it to null."
            )
        for task in self.tasks:
            if (task.corruption == CLEAN) != (task.severity == 0):
                raise DataError(
                    f"The task {task.name}: severity 0 is that of data.corruptions=[{CLEAN}] "
                    "alone, data.severities are 1 to 5 otherwise."
                )
        for task in tasks if on_the_fly else []:
            check_corruption(task.corruption, task.severity)
            if task.corruption == "frost":
                load_frost(self._views.frost_dir)  # once, before the workers are forked

    def _classes(self, file: str | Path) -> Classes:
        known = read_classes(file)
        if len(known) == self.num_classes:
            return known
        found = self.source.class_names(self.tasks[0])
        if len(found) != self.num_classes:
            raise DataError(
                f"data.num_classes={self.num_classes}, but the images of task "
                f"{self.tasks[0].name} are of {len(found)} classes, and data.classes={file} has "
                f"{len(known)}. Set data.num_classes={len(found)} if these are all."
            )
        prompts = dict(zip(known.names, known.prompts, strict=True))
        words = tuple(prompts.get(name, name) for name in found)
        return replace(coloured_classes(found), prompts=words)

    def _require_same_images(self) -> None:
        """Tasks show the same images: a gap would shift the order."""
        names = {task: _names(images) for task, images in self._images.items()}
        every = set().union(*names.values())
        for task, found in names.items():
            absent = sorted(every - found)
            if not absent:
                continue
            other = next(each for each in self.tasks if absent[0] in names[each])
            raise DataError(
                f"data={self.name}: the task {task.name} lacks {len(absent)} of {len(every)} "
                f"images, the first one {absent[0]}, which {other.name} has. Complete the folder "
                f"of {task.name}, take the image out of {other.name} if it does not belong there, "
                "or leave one of the tasks out (data.corruptions, data.severities)."
            )


class _Stream:
    """The items of one or several tasks; `places` says which image stands where."""

    def __init__(
        self,
        images: Sequence[LabelledImages],
        tasks: Sequence[Task],
        places: Int[np.ndarray, "N 2"],
        views: Views,
    ) -> None:
        self._images, self._tasks, self._places, self._views = images, tasks, places, views

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> dict[str, Any]:
        which, index = self._places[position].tolist()
        return self._views.item(self._images[which], index, self._tasks[which])


def as_batch(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of equal size as one batch; a label is a map of one pixel."""
    sizes = {(*item["image"].shape[2:],): item["name"] for item in items}
    if len(sizes) > 1:
        (size, name), (other, its_name) = list(sizes.items())[:2]
        raise DataError(
            f"{name} is {size[0]} x {size[1]} and {its_name} is {other[0]} x {other[1]}: images of "
            "a batch have one size. Set data.view, which prepares them, or data.batch_size=1."
        )
    same = all(item["original"] is item["image"] for item in items)
    image = torch.cat([item["image"] for item in items])
    return {
        "image": image,
        "original": image if same else torch.cat([item["original"] for item in items]),
        "label": torch.cat([item["label"] for item in items]),
        "name": [item["name"] for item in items],
        "size": (1, 1),
        "task": [item["task"] for item in items],
    }


def _alone() -> tuple[int, int]:
    return 0, 1


def _names(images: LabelledImages) -> set[str]:
    return {images.name(index) for index in range(len(images))}


def _require_images_as_they_are(protocol: EvaluationProtocol) -> None:
    """A protocol is about maps of pixels; `view` says how a classifier's image is prepared."""
    sized = protocol.scale is not None or protocol.multiple is not None
    if sized or protocol.mode != "whole" or protocol.averages_probabilities:
        raise DataError(
            f"protocol={protocol.name} resizes images or looks at them several times; a "
            "classifier's images are prepared by data.view alone. Set protocol=whole."
        )
