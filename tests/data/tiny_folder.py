"""Small generated data sets in the layouts of the real ones."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from segmill.data.classes import Classes
from segmill.data.folder import FolderDataset

CLASSES = Classes(("sky", "road", "car"), np.eye(3, dtype=np.uint8) * 255, ("sky", "road", "car"))


def write_image(path: Path, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """A smooth random RGB image; returns what was written (before JPEG)."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


def write_label(
    path: Path, values: tuple[int, ...] = (0, 1, 2), height: int = 24, width: int = 32
) -> np.ndarray:
    """Vertical stripes of `values`."""
    label = np.repeat(np.resize(values, 8), width // 8)[None].repeat(height, 0).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path)
    return label


def write_samples(root: Path, names: str = "a b c", split: str = "train") -> None:
    """images/SPLIT/NAME.jpg and labels/SPLIT/NAME.png."""
    for seed, name in enumerate(names.split()):
        write_image(root / "images" / split / f"{name}.jpg", seed=seed)
        write_label(root / "labels" / split / f"{name}.png")


def folder_keys(root: Path, **changes: Any) -> dict[str, Any]:
    """Keywords of FolderDataset for what `write_samples` writes."""
    keys = {
        "data_root": root,
        "image": "images/{split}/{name}.jpg",
        "label": "labels/{split}/{name}.png",
        "depth": None,
        "depth_range": None,
        "splits": {"train": {}, "val": {}},
        "label_map": {"0-2": "0-2", 255: "ignore"},
        "label_format": "index",
    }
    return {**keys, **changes}


def tiny_dataset(root: Path, split: str = "train", **changes: Any) -> FolderDataset:
    """The data set over `folder_keys`."""
    return FolderDataset(split=split, classes=CLASSES, **folder_keys(root, **changes))
