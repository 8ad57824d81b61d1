"""The few images of a comparison that its report shows, kept as files so that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Integer, UInt8
from torch import Tensor

from segmill.data.tasks import Task
from segmill.errors import SegmillError
from segmill.files import write_whole

FOLDER = "pictures"


class Pictures:
    """Chooses `count` images, spread over the tasks, and keeps what each method says of them.

    They are the last ones of their tasks, when a method has had the time to adapt; `images` is how
    many a task has, or the one stream of all.

    RUN/pictures holds the images and labels, RUN/METHOD/pictures the predictions as class indices.
    """

    def __init__(self, folder: Path, tasks: Sequence[Task], *, count: int, images: int) -> None:
        self._folder = folder
        chosen = [(tasks[n * len(tasks) // count], images - 1 - n % images) for n in range(count)]
        # Few images: each once.
        self.wanted = list(dict.fromkeys((task.name, index) for task, index in chosen))

    def keep_for(self, method: str, task: Task) -> Callable[[int, dict[str, Any], Tensor], None]:
        """What TTAModule calls for every batch of a task."""
        wanted = {index for name, index in self.wanted if name == task.name}

        def keep(first: int, batch: dict[str, Any], pred: Tensor) -> None:
            for index in wanted & set(range(first, first + len(pred))):
                stem, one = f"{task.name}_{index}", index - first
                own = self._folder / FOLDER
                image = batch["original"][one].permute(1, 2, 0).cpu().numpy()
                _write(own / f"{stem}_image.png", np.ascontiguousarray(image[..., 2::-1]))
                _write(own / f"{stem}_label.png", batch["label"][one].cpu().numpy())
                _write(self._folder / method / FOLDER / f"{stem}.png", pred[one].cpu().numpy())

        return keep

    def image(self, task: str, index: int) -> UInt8[np.ndarray, "_h _w 3"]:
        """The corrupted image."""
        bgr = _read(self._folder / FOLDER / f"{task}_{index}_image.png")
        return np.ascontiguousarray(bgr[..., ::-1])

    def label(self, task: str, index: int) -> Integer[np.ndarray, "H W"]:
        """Its ground truth."""
        return _read(self._folder / FOLDER / f"{task}_{index}_label.png")

    def pred(self, method: str, task: str, index: int) -> Integer[np.ndarray, "H W"]:
        """What a method said of it."""
        return _read(self._folder / method / FOLDER / f"{task}_{index}.png")


def _write(path: Path, pixels: np.ndarray) -> None:
    """Classes of more than 256 take two bytes, and so does a label that is none (-1)."""
    kept = pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)
    write_whole(path, cv2.imencode(".png", kept)[1].tobytes())


def _read(path: Path) -> Integer[np.ndarray, "H W *C"]:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise SegmillError(
            f"The picture {path} of the run is gone. Start the comparison again, or leave pictures "
            "out with pictures=0."
        )
    return pixels
