"""Segmenter: a model with everything that prediction needs, in memory and in one file.

`model.safetensors` holds the weights; its metadata holds the model's own configuration, classes,
palette, normalisation and protocol, so nothing else is needed to predict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from segmill.checkpoint.choose import outline
from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import (
    choose_rules,
    find_file,
    load_arrays,
    load_weights,
    save_safetensors,
    shapes_of,
)
from segmill.checkpoint.read import read_checkpoint, read_metadata
from segmill.checkpoint.report import compare
from segmill.configuration import build, compose
from segmill.data.classes import Classes, read_classes
from segmill.errors import SegmillError
from segmill.inference import predict_label
from segmill.models.discriminative import Discriminative
from segmill.options import options, suggestion
from segmill.protocol import Protocol
from segmill.report.overlay import overlay

FORMAT = 1
DEFAULT_CLASSES = 150  # of a variant whose weights and class count are not given: ADE20K


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
class Segmenter:
    """A model ready to predict.

    `network` is the plain nn.Module in eval mode: normalised image (B, C, H, W) -> logits
    (B, K, h, w), and `network.losses(image, label)` -> terms whose sum is the training loss.
    """

    model: Discriminative
    classes: Classes
    protocol: Protocol
    config: Mapping[str, Any]
    depth_range: tuple[float, float] | None = None

    @property
    def network(self) -> nn.Module:
        """The family's network, without normalisation."""
        return self.model.network

    @property
    def channels(self) -> int:
        """3 for RGB, 4 when depth is the fourth channel."""
        return int(self.model.mean.numel())

    def to(self, device: str | torch.device) -> Segmenter:
        """Move the model; returns itself, so that calls chain."""
        self.model.to(device)
        return self

    def predict(self, image: str | Path | UInt8[np.ndarray, "H W C"]) -> Prediction:
        """Segment a file or an RGB array (with depth as the fourth channel for RGB-D models)."""
        array = _read_image(image) if isinstance(image, str | Path) else image
        if array.ndim != 3 or array.shape[2] != self.channels:
            raise SegmillError(
                f"This model takes (H, W, {self.channels}) uint8 images, got an array of shape "
                f"{array.shape}. "
                + ("Depth is the fourth channel, 8 bit." if self.channels == 4 else "Pass RGB.")
            )
        with torch.inference_mode():
            images = [
                self.model.normalise(self._tensor(each)) for each in self.protocol.inputs(array)
            ]
            height, width = array.shape[:2]
            label = predict_label(self.network, images, (height, width), self.protocol)
        return Prediction(array, label[0].cpu().numpy().astype(np.uint8), self.classes)

    def _tensor(self, image: UInt8[np.ndarray, "H W C"]) -> Tensor:
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(channels_first)[None].to(self.model.mean.device)


def open_segmenter(
    source: str | Path, *, weights: str | Path | None = None, num_classes: int | None = None
) -> Segmenter:
    """Open a run folder, a `model.safetensors`, or build a variant and load `weights` into it.

    Raises SegmillError when the source is none of these, or when a key of the weights is missing,
    unused or has the wrong shape.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file():
        if weights is not None or num_classes is not None:
            raise SegmillError(
                f"{path} brings its own weights and classes; `weights` and `num_classes` go with a "
                f"variant's name, as in load('pspnet_r50-d8', weights={str(weights)!r})."
            )
        return _open_file(path)
    if path.suffix or len(path.parts) > 1 or path.name not in options("model"):
        hint = suggestion(path.name, options("model"))
        raise SegmillError(
            f"{path} does not exist{hint or '.'} Give a run folder, a model.safetensors, or the "
            f"name of a variant in configs/model/discriminative."
        )
    return _build_variant(str(source), weights=weights, num_classes=num_classes)


def save_segmenter(path: Path, segmenter: Segmenter) -> None:
    """Write `model.safetensors`: weights, and all that prediction needs in the metadata."""
    description = {
        "format": FORMAT,
        "model": self_contained(segmenter.config),
        "classes": {
            "names": list(segmenter.classes.names),
            "palette": segmenter.classes.palette.tolist(),
            "prompts": list(segmenter.classes.prompts),
        },
        "protocol": segmenter.protocol.stamp(),
        "depth_range": segmenter.depth_range,
    }
    state = {name: value.cpu() for name, value in segmenter.network.state_dict().items()}
    save_safetensors(path, state, {"segmill": json.dumps(description)})


def _open_file(path: Path) -> Segmenter:
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
    model: Discriminative = build(facts["model"])
    load_arrays(model.network, read_checkpoint(path))
    classes = facts["classes"]
    depth_range = facts["depth_range"]
    return Segmenter(
        model=model.eval(),
        classes=Classes(
            tuple(classes["names"]),
            np.array(classes["palette"], dtype=np.uint8),
            tuple(classes["prompts"]),
        ),
        protocol=_protocol(facts["protocol"]),
        config=facts["model"],
        depth_range=None if depth_range is None else (depth_range[0], depth_range[1]),
    )


def _build_variant(name: str, *, weights: str | Path | None, num_classes: int | None) -> Segmenter:
    count = num_classes
    if count is None:
        count = DEFAULT_CLASSES if weights is None else _classes_of(name, str(weights))
    config = compose("load", [f"model={name}", f"data.num_classes={count}"])
    model: Discriminative = build(config.model)
    if weights is not None:
        load_weights(model.network, str(weights))
    return Segmenter(
        model=model.eval(),
        classes=default_classes(count),
        protocol=build(config.protocol),
        config=plain(config.model),
    )


def _classes_of(name: str, weights: str) -> int:
    """Where the file's shapes differ from those of a model with `DEFAULT_CLASSES`: its count."""
    config = compose("load", [f"model={name}", f"data.num_classes={DEFAULT_CLASSES}"])
    with torch.device("meta"):
        network = build(config.model).network
    arrays = outline(read_checkpoint(find_file(weights)))
    _, rules = choose_rules(network, arrays)
    report = compare(apply_rules(arrays, rules), shapes_of(network))
    counts = [found[0] for _, found, own in report.wrong_shape if own[0] == DEFAULT_CLASSES]
    return counts[0] if counts else DEFAULT_CLASSES


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as a dictionary, which is what files and metadata hold."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


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
    hues = (np.arange(count) * 0.618034 % 1.0 * 179).astype(np.uint8)
    hsv = np.stack([hues, np.full(count, 200, np.uint8), np.full(count, 220, np.uint8)], axis=-1)
    palette = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    return Classes(tuple(f"class {index}" for index in range(count)), palette, ())


def _read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise SegmillError(f"{path} cannot be read as an image. Is the path right, the file whole?")
    return np.ascontiguousarray(pixels[..., ::-1])


def _protocol(stamp: Mapping[str, Any]) -> Protocol:
    return Protocol(**{key: value for key, value in stamp.items() if key != "version"})
