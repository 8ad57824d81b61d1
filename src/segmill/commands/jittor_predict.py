"""`segmill predict runtime=jittor`: overlays, index PNGs and a legend, without torch."""

from __future__ import annotations

import logging

import numpy as np
from omegaconf import DictConfig

from segmill.commands.jittor_parts import built, open_model, use_device
from segmill.commands.prediction import output_folder, require_depth
from segmill.configuration import Invocation
from segmill.data.inputs import iter_inputs
from segmill.data.splits import channels_first
from segmill.errors import SegmillError
from segmill.jittor.training import predict
from segmill.model_file import fitting_image
from segmill.report.prediction import PredictionWriter

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:  # noqa: ARG001
    """Predict every image, folder, glob or video of `path`."""
    if config.weights is not None or config.num_classes is not None:
        raise SegmillError(
            "predict runtime=jittor takes run=RUN, a run folder or its model.safetensors, which "
            "brings weights and classes; leave out weights= and num_classes=."
        )
    use_device(config.accelerator)
    model, description = open_model(config.run)
    protocol = description.protocol if config.protocol is None else built(config.protocol)
    channels = len(model.mean)
    require_depth(config.run, channels=channels, depth=config.depth)
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    folder = output_folder(config)
    count = 0
    with PredictionWriter(folder, classes=description.classes, alpha=config.alpha) as writer:
        inputs = iter_inputs(paths, depth=config.depth, depth_range=description.depth_range)
        for source in inputs:
            image = fitting_image(source.image, channels=channels)
            views = [channels_first(each) for each in protocol.inputs(image)]
            label = predict(model, views, image.shape[:2], protocol, 0)[0]
            overlay = writer.write(source, label.astype(np.uint8))
            count += 1
            if source.frame is None:
                log.info("%s", overlay)
    log.info("%d image(s) predicted under protocol %s", count, protocol.name)
    log.info("Next: open %s", folder / "overlay")
