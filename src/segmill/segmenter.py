"""Segmenter: a model with everything that prediction needs, in memory and in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from omegaconf import DictConfig
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
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.report import compare
from segmill.configuration import build, compose, plain
from segmill.data.classes import Classes
from segmill.draws import draws_of
from segmill.errors import SegmillError
from segmill.inference import predict_label
from segmill.model_file import (
    Description,
    Prediction,
    default_classes,
    fitting_image,
    read_description,
)
from segmill.models.discriminative import Discriminative
from segmill.options import options, suggestion
from segmill.protocol import Protocol

DEFAULT_CLASSES = 150  # of a variant whose weights and class count are not given: ADE20K


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
    def description(self) -> Description:
        """Everything but the weights."""
        return Description(
            config=self.config,
            classes=self.classes,
            protocol=self.protocol,
            depth_range=self.depth_range,
        )

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
        array = fitting_image(image, channels=self.channels)
        with torch.inference_mode(), draws_of(0, self.model.mean.device):
            height, width = array.shape[:2]
            label = predict_label(self.network, self.views(array), (height, width), self.protocol)
        return Prediction(array, label[0].cpu().numpy().astype(np.uint8), self.classes)

    def views(self, image: UInt8[np.ndarray, "H W C"]) -> list[Float[Tensor, "1 C _h _w"]]:
        """What the network sees of an image under the protocol."""
        return [self.model.normalise(self._tensor(each)) for each in self.protocol.inputs(image)]

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
    state = {name: value.cpu() for name, value in segmenter.network.state_dict().items()}
    save_safetensors(path, state, segmenter.description.metadata())


def _open_file(path: Path) -> Segmenter:
    found = read_description(path)
    model: Discriminative = build(found.config)
    load_arrays(model.network, read_checkpoint(path))
    return Segmenter(
        model=model.eval(),
        classes=found.classes,
        protocol=found.protocol,
        config=found.config,
        depth_range=found.depth_range,
    )


def _build_variant(name: str, *, weights: str | Path | None, num_classes: int | None) -> Segmenter:
    count = num_classes
    if count is None:
        count = DEFAULT_CLASSES if weights is None else _classes_of(name, str(weights))
    config = _composed(name, count)
    model: Discriminative = build(config.model)
    if weights is not None:
        load_weights(model.network, str(weights))
    return Segmenter(
        model=model.eval(),
        classes=default_classes(count),
        protocol=build(config.protocol),
        config=plain(config.model),
    )


def _composed(name: str, num_classes: int) -> DictConfig:
    """The variant for so many classes, and for as many channels as it has means."""
    config = compose("load", [f"model={name}", f"data.num_classes={num_classes}"])
    config.data.channels = len(config.model.mean)
    return config


def _classes_of(name: str, weights: str) -> int:
    """Where the file's shapes differ from those of a model with `DEFAULT_CLASSES`: its count."""
    config = _composed(name, DEFAULT_CLASSES)
    with torch.device("meta"):
        network = build(config.model).network
    arrays = outline(read_checkpoint(find_file(weights)))
    _, rules = choose_rules(network, arrays)
    report = compare(apply_rules(arrays, rules), shapes_of(network))
    counts = [found[0] for _, found, own in report.wrong_shape if own[0] == DEFAULT_CLASSES]
    return counts[0] if counts else DEFAULT_CLASSES
