"""The handwritten digits that scikit-learn brings along: real images without a download.

1797 digits of 43 people, 8 x 8 grey values of 0..16: the test part of E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from segmill.data.files import DataError
from segmill.data.labelled_image import LabelledImage
from segmill.data.tasks import Task

NAMES = tuple("0123456789")
# One permutation for every use: what is adapted to was never trained on.
SPLIT_SEED = 0
SPLITS = {"train": slice(0, 1000), "val": slice(1000, 1200), "test": slice(1200, 1797)}
_HIGHEST = 16  # grey value of white ink


class Digits:
    """A split of the digits as RGB images, white on black, enlarged to `size` x `size` pixels."""

    def __init__(self, *, split: str, size: int) -> None:
        if split not in SPLITS:
            raise DataError(f"The digits have no split {split!r}; there are {', '.join(SPLITS)}.")
        grey, labels = _bundled()
        order = np.random.RandomState(SPLIT_SEED).permutation(len(grey))
        self._indices = order[SPLITS[split]]
        self._labels = labels[self._indices]
        self._images = [_enlarged(grey[index], size) for index in self._indices]

    def __len__(self) -> int:
        """Number of digits."""
        return len(self._indices)

    def __getitem__(self, index: int) -> LabelledImage:
        """One digit; its array is shared, so nobody writes into it."""
        return LabelledImage(self._images[index], int(self._labels[index]), self.name(index))

    def name(self, index: int) -> str:
        """The digit's position in scikit-learn's list."""
        return f"digit_{self._indices[index]:04d}"


class DigitsOfTasks:
    """The clean digits, the same for every task: they are corrupted while they are read."""

    def __init__(self, *, split: Literal["train", "val", "test"], size: int) -> None:
        self._digits = Digits(split=split, size=size)

    def require_tasks(self, tasks: Sequence[Task], *, on_the_fly: bool) -> None:
        """Nothing on disk is corrupted."""
        if not on_the_fly and any(task.severity for task in tasks):
            raise DataError(
                "The digits are clean: they are corrupted while they are read. Set "
                "data.on_the_fly=true, or data.corruptions=[clean] data.severities=[0]."
            )

    def class_names(self, task: Task) -> tuple[str, ...]:  # noqa: ARG002
        """The ten digits."""
        return NAMES

    def images(self, task: Task, names: Sequence[str]) -> Digits:  # noqa: ARG002
        """The digits of the split."""
        return self._digits


def _enlarged(grey: UInt8[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "H W 3"]:
    values = (grey.astype(np.float32) * (255 / _HIGHEST)).round().astype(np.uint8)
    large = cv2.resize(values, (size, size), interpolation=cv2.INTER_LINEAR)
    return np.repeat(large[..., None], 3, axis=2)


@lru_cache(maxsize=1)
def _bundled() -> tuple[UInt8[np.ndarray, "N h w"], Int64[np.ndarray, " N"]]:
    try:
        from sklearn.datasets import load_digits  # takes a second, and only the digits need it
    except ImportError as error:
        raise DataError(
            "The digits come with scikit-learn, which is not installed here: "
            'pip install "segmill[tta]".'
        ) from error
    found: Any = load_digits()
    return found.images.astype(np.uint8), found.target.astype(np.int64)
