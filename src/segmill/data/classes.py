"""Class names, colours and prompts, from CSV files: `name,red,green,blue[,prompt]` a row."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import UInt8

from segmill.data.files import DataError
from segmill.paths import CONFIGS


@dataclass(frozen=True)
class Classes:
    """Row k of the file is class k. A prompt names the class to a text-conditioned model."""

    names: tuple[str, ...]
    palette: UInt8[np.ndarray, "K 3"]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        """Number of classes, the ignored value not counted."""
        return len(self.names)


@runtime_checkable
class HasClasses(Protocol):
    """A data set, whatever its task."""

    name: str
    classes: Classes


def read_classes(source: str | Path) -> Classes:
    """Read a CSV file; a bare name is `NAME.csv` in configs/classes, here or in the package."""
    path = Path(source)
    folders = (Path.cwd() / "configs" / "classes", CONFIGS / "classes")
    if path.suffix != ".csv":
        files = [folder / f"{source}.csv" for folder in folders]
        path = next((file for file in files if file.is_file()), files[-1])
    if not path.is_file():
        known = ", ".join(sorted({file.stem for each in folders for file in each.glob("*.csv")}))
        raise DataError(
            f"The class file {path} does not exist. Set data.classes to a CSV file with the "
            f"columns name,red,green,blue[,prompt], or to one of: {known}."
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return _classes(rows, path)


def counted_classes(source: str | Path, num_classes: int) -> Classes:
    """`read_classes`, refusing a file with another number of classes than the models are for."""
    classes = read_classes(source)
    if len(classes) != num_classes:
        raise DataError(
            f"data.num_classes={num_classes}, but the class file data.classes={source} has "
            f"{len(classes)} classes. Set data.num_classes={len(classes)}, or correct the file."
        )
    return classes


def coloured_classes(names: Sequence[str]) -> Classes:
    """Classes without a file, in distinct colours."""
    hues = (np.arange(len(names)) * 0.618034 % 1.0 * 179).astype(np.uint8)
    full = np.full(len(names), 200, np.uint8), np.full(len(names), 220, np.uint8)
    hsv = np.stack([hues, *full], axis=-1)
    palette = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0].astype(np.uint8)
    return Classes(tuple(names), palette, tuple(names))


def _classes(rows: list[dict[str, str]], path: Path) -> Classes:
    names = tuple(row.get("name", "") for row in rows)
    if not rows or not all(names):
        raise DataError(
            f"{path} names no class in row {names.index('') + 2 if names else 2}. "
            "Its first line must be name,red,green,blue or name,red,green,blue,prompt."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the class {twice[0]!r} twice: every class needs its own name.")
    colours = [_colour(row, line, path) for line, row in enumerate(rows, start=2)]
    prompts = tuple(row.get("prompt") or row["name"] for row in rows)
    return Classes(names, np.array(colours, np.uint8), prompts)


def _colour(row: dict[str, str], line: int, path: Path) -> list[int]:
    texts = [row.get(column) or "" for column in ("red", "green", "blue")]
    if not all(text.isdecimal() and int(text) < 256 for text in texts):
        raise DataError(
            f"{path}, line {line}: the colour of {row['name']!r} is {texts}; "
            "red, green and blue must be numbers from 0 to 255."
        )
    return [int(text) for text in texts]
