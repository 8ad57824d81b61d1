"""`segmill predict run=RUN PATH...`: overlays, index PNGs and a legend for any images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from segmill.commands.predict_classes import predict_classes, view_of_run
from segmill.commands.prediction import output_folder, require_depth
from segmill.configuration import Invocation, build
from segmill.data.inputs import Input, iter_inputs
from segmill.errors import SegmillError
from segmill.models.families.image_classifier import ImageClassifier
from segmill.report.prediction import PredictionWriter
from segmill.segmenter import Segmenter, open_segmenter

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:  # noqa: ARG001
    """Predict every image, folder, glob or video of `path`."""
    segmenter = open_segmenter(config.run, weights=config.weights, num_classes=config.num_classes)
    if config.protocol is not None:
        segmenter = replace(segmenter, protocol=build(config.protocol))
    require_depth(config.run, channels=segmenter.channels, depth=config.depth)
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    segmenter.to(_device(config.accelerator))
    folder = output_folder(config)
    inputs = iter_inputs(paths, depth=config.depth, depth_range=segmenter.depth_range)
    if isinstance(segmenter.network, ImageClassifier):
        count = predict_classes(segmenter, inputs, folder, view=view_of_run(Path(config.run)))
        opens = folder / "predictions.csv"
    else:
        count = _predict(segmenter, inputs, folder, alpha=config.alpha)
        opens = folder / "overlay"
    log.info("%d image(s) predicted under protocol %s", count, segmenter.protocol.name)
    log.info("Next: open %s", opens)


def _predict(segmenter: Segmenter, inputs: Iterable[Input], folder: Path, *, alpha: float) -> int:
    count = 0
    with PredictionWriter(folder, classes=segmenter.classes, alpha=alpha) as writer:
        for source in inputs:
            overlay = writer.write(source, segmenter.predict(source.image).label)
            count += 1
            if source.frame is None:
                log.info("%s", overlay)
    return count


def _device(accelerator: str) -> str:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise SegmillError(
            "accelerator=gpu, but no CUDA device is visible; segmill doctor says why."
        )
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
