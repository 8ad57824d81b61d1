"""A miniature ADE20K in its real layout, and the data of its tasks."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from segmill.configuration import build
from segmill.data.task_data import TaskData
from segmill.paths import CONFIGS
from segmill.protocol import Protocol

NAMES = ("ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003")
HEIGHT, WIDTH = 36, 48
PROTOCOL = Protocol(
    name="whole",
    scale=None,
    multiple=None,
    mode="whole",
    window=None,
    stride=None,
    ratios=(1.0,),
    flip=False,
    pad_divisor=None,
    align_corners=False,
    ignore_index=255,
)


def write_picture(path: Path, seed: int) -> None:
    """A smooth random image that is large enough to be corrupted."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_values(path: Path, values: tuple[int, ...]) -> None:
    """A label with stripes of `values`."""
    label = np.resize(np.repeat(values, 4), WIDTH)[None].repeat(HEIGHT, 0).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path)


def write_ade20k(root: Path) -> Path:
    """Three validation images with their annotations."""
    for seed, name in enumerate(NAMES):
        write_picture(root / "images" / "validation" / f"{name}.jpg", seed)
        write_values(root / "annotations" / "validation" / f"{name}.png", (0, 1, 150))
    return root


def task_data(name: str, *, protocol: Protocol = PROTOCOL, seed: int = 0, **keys: Any) -> TaskData:
    """The data of configs/data/NAME.yaml with changed `keys`."""
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")})
    config.data.merge_with({"workers": 0, **keys})
    return build(config.data, protocol=protocol, seed=seed)
