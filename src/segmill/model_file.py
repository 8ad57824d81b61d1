"""`model.safetensors` without its weights: what else prediction needs, in the file's metadata.

The metadata holds the model's own configuration, classes, palette, normalisation and protocol, so
nothing else is needed to predict. No framework: every runtime reads and writes the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from segmill.checkpoint.read import read_metadata
from segmill.data.classes import Classes, coloured_classes, read_classes
from segmill.errors import SegmillError
from segmill.protocol import Protocol
from segmill.report.overlay import overlay

FORMAT = 1


@dataclass(frozen=True)
class Prediction:
    """The class of every pixel of one image, at the image's own size."""

    image: UInt8[np.ndarray, "H W C"]
    label: UInt8[np.ndarray, "H W"]
    classes: Classes

    def overlay(self, alpha: float = 0.5) -> UInt8[np.ndarray, "H W 3"]:
        """The image (RGB) with its classes in colour on top."""
        return overlay(self.image[..., :3], self.label, self.classes.palette, alpha=alpha)


@dataclass(frozen=True)
class Description:
    """A model but for its weights; `config` is its YAML, resolved, with `_target_` of torch."""

    config: Mapping[str, Any]
    classes: Classes
    protocol: Protocol
    depth_range: tuple[float, float] | None

    def metadata(self) -> dict[str, str]:
        """As safetensors keeps it."""
        description = {
            "format": FORMAT,
            "model": self_contained(self.config),
            "classes": {
                "names": list(self.classes.names),
                "palette": self.classes.palette.tolist(),
                "prompts": list(self.classes.prompts),
            },
            "protocol": self.protocol.stamp(),
            "depth_range": self.depth_range,
        }
        return {"segmill": json.dumps(description)}


def read_description(path: Path) -> Description:
    """The description in a `model.safetensors`; SegmillError when it holds weights alone."""
    description = read_metadata(path).get("segmill")
    if description is None:
        raise SegmillError(
            f"{path} holds weights but not a segmill model. Name the variant: "
            f"load('pspnet_r50-d8', weights={str(path)!r}); `segmill weights inspect {path}` "
            f"says which one matches."
        )
    facts = json.loads(description)
    if facts["format"] > FORMAT:
        raise SegmillError(f"{path} was written by a newer segmill; upgrade to open it.")
    classes, depth_range, stamp = facts["classes"], facts["depth_range"], facts["protocol"]
    return Description(
        config=facts["model"],
        classes=Classes(
            tuple(classes["names"]),
            np.array(classes["palette"], dtype=np.uint8),
            tuple(classes["prompts"]),
        ),
        protocol=Protocol(**{key: value for key, value in stamp.items() if key != "version"}),
        depth_range=None if depth_range is None else (depth_range[0], depth_range[1]),
    )


def fitting_image(
    image: str | Path | UInt8[np.ndarray, "H W C"], *, channels: int
) -> UInt8[np.ndarray, "H W C"]:
    """The image, read if it is a path; refused when it has not as many channels as the model."""
    array = _read_image(image) if isinstance(image, str | Path) else image
    if array.ndim != 3 or array.shape[2] != channels:
        raise SegmillError(
            f"This model takes (H, W, {channels}) uint8 images, got an array of shape "
            f"{array.shape}. "
            + ("Depth is the fourth channel, 8 bit." if channels == 4 else "Pass RGB.")
        )
    return array


def self_contained(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's configuration with `weights: null` in every part: the file has them all."""
    return {
        key: self_contained(value)
        if isinstance(value, Mapping)
        else (None if key == "weights" else value)
        for key, value in config.items()
    }


def default_classes(count: int) -> Classes:
    """The data set whose class count is `count`, else numbered classes in distinct colours.

    Only names and colours depend on this guess; a run's own file always brings its classes.
    """
    known = {11: "camvid", 19: "cityscapes", 21: "pascal_voc12", 150: "ade20k"}
    if count in known:
        return read_classes(known[count])
    return coloured_classes([f"class {index}" for index in range(count)])


def _read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise SegmillError(f"{path} cannot be read as an image. Is the path right, the file whole?")
    return np.ascontiguousarray(pixels[..., ::-1])
