"""`label_map`: what every value of a label file means, settled once, as a 256-entry look-up."""

from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import UInt8

from segmill.data.files import DataError
from segmill.data.sample import IGNORE

# Marks file values that the map does not mention. Labels are uint8, so 254 classes are the limit.
_UNMAPPED = 254


class LabelMap:
    """`{0: ignore, "1-150": "0-149"}` -> a table from file values to classes."""

    def __init__(self, label_map: Mapping[int | str, int | str], *, num_classes: int) -> None:
        if num_classes > _UNMAPPED:
            raise DataError(
                f"{num_classes} classes do not fit into 8-bit labels (at most {_UNMAPPED})."
            )
        self.num_classes = num_classes
        self.table = np.full(256, _UNMAPPED, np.uint8)
        mentioned: set[int] = set()
        for key, meaning in label_map.items():
            values = _values(key, f"the key {key!r}")
            classes = self._classes(meaning, values, key)
            twice = mentioned.intersection(values)
            if twice:
                raise DataError(
                    f"data.label_map mentions the value {min(twice)} twice (again in {key!r}). "
                    "Every value of the files needs one meaning."
                )
            mentioned.update(values)
            self.table[list(values)] = classes

    def __call__(self, label: UInt8[np.ndarray, "H W"], where: str) -> UInt8[np.ndarray, "H W"]:
        """Classes and 255; a value outside the map raises with its pixel count."""
        mapped = cv2.LUT(label, self.table)
        if (mapped == _UNMAPPED).any():
            self._refuse(label, mapped, where)
        return mapped

    def _classes(self, meaning: int | str, values: range, key: int | str) -> list[int]:
        if meaning == "ignore":
            return [IGNORE] * len(values)
        classes = _values(meaning, f"the class {meaning!r} of {key!r}")
        if len(classes) != len(values):
            raise DataError(
                f"data.label_map: {key!r} has {len(values)} values, but {meaning!r} has "
                f"{len(classes)} classes. Write ranges of equal length, like '1-150': '0-149'."
            )
        if classes[-1] >= self.num_classes:
            raise DataError(
                f"data.label_map sends {values[-1]} to class {classes[-1]}, but the class file has "
                f"{self.num_classes} classes (0-{self.num_classes - 1}). Correct data.label_map "
                "or data.classes."
            )
        return list(classes)

    def _refuse(self, label: np.ndarray, mapped: np.ndarray, where: str) -> None:
        values, counts = np.unique(label[mapped == _UNMAPPED], return_counts=True)
        found = ", ".join(
            f"{value} ({count} pixels)" for value, count in zip(values, counts, strict=True)
        )
        raise DataError(
            f"The label {where} has values outside data.label_map: {found}. "
            f"Add them to label_map (for example {values[0]}: ignore, or a class below "
            f"{self.num_classes}), or correct the file."
        )


def _values(text: int | str, what: str) -> range:
    first, dash, last = str(text).partition("-")
    ends = (first, last if dash else first)
    if all(end.strip().isdecimal() for end in ends) and int(ends[0]) <= int(ends[1]) <= 255:
        return range(int(ends[0]), int(ends[1]) + 1)
    raise DataError(
        f"data.label_map: {what} is not understood. Keys are values of the files, 0 to 255, or "
        "ranges like '1-150'; meanings are class indices, ranges of equal length, or ignore."
    )
