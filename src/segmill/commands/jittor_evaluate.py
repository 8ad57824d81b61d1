"""`segmill eval runtime=jittor`: the same protocols, metrics and report, without torch."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from omegaconf import DictConfig

from segmill.commands.jittor_parts import (
    build_model,
    built,
    checked_settings,
    load_weights,
    open_model,
    use_device,
)
from segmill.commands.reporting import Scored, report, result_folder
from segmill.commands.run_config import config_of_run, require_same_classes
from segmill.commands.run_folder import write_provenance
from segmill.configuration import Invocation, plain
from segmill.data.splits import channels_first
from segmill.errors import SegmillError
from segmill.jittor.data.datamodule import SegmentationData
from segmill.jittor.models.discriminative import Discriminative
from segmill.jittor.training import Evaluation, predict
from segmill.model_file import Description
from segmill.protocol import Protocol

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:
    """Score `run=` (a run folder or model.safetensors), or `model=` with `weights=`."""
    config = config_of_run(config, context)
    use_device(checked_settings(config.trainer).accelerator)
    protocol: Protocol = built(config.protocol)
    data: SegmentationData = built(
        config.data, protocol=protocol, seed=config.seed, accumulate=1, start_step=0
    )
    split = config.split or data.val_split
    model, description = _model(config, data, protocol)
    data.dataset(split)  # a split that does not exist is refused before a folder is made
    folder = result_folder(config, data, split, protocol)
    write_provenance(folder, config, context.command)
    report(score(model, description, data, split=split), folder)
    source = config.run or f"{config.model_name} weights={config.weights}"
    log.info(
        "Next: open %s, or segmill predict runtime=jittor run=%s IMAGE",
        folder / "report.html",
        source,
    )


def score(
    model: Discriminative, description: Description, data: SegmentationData, *, split: str
) -> Scored:
    """Score every image of `split` once."""
    protocol = description.protocol
    evaluation = Evaluation(model, protocol, num_classes=len(description.classes))
    started = time.perf_counter()
    evaluation.run(data.eval_items(split))

    def label(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W"]:
        inputs = [channels_first(each) for each in protocol.inputs(image)]
        return predict(model, inputs, image.shape[:2], protocol, 0)[0].astype(np.uint8)

    return Scored(
        data_name=data.name,
        split=split,
        dataset=data.dataset(split),
        classes=description.classes,
        protocol=protocol,
        confusion=evaluation.confusion,
        per_image=evaluation.per_image,
        seconds=time.perf_counter() - started,
        predict=label,
    )


def _model(
    config: DictConfig, data: SegmentationData, protocol: Protocol
) -> tuple[Discriminative, Description]:
    if config.run is not None:
        model, found = open_model(config.run)
        require_same_classes(found.classes, data)
        return model, replace(found, protocol=protocol)
    if config.weights is None:
        raise SegmillError("Nothing to evaluate: give run=runs/NAME, or model=NAME weights=FILE.")
    model = build_model(config.model, seed=config.seed)
    load_weights(
        model,
        config.weights,
        may_miss=tuple(config.weights_may_miss),
        may_leave=tuple(config.weights_may_leave),
    )
    return model, Description(
        config=plain(config.model),
        classes=data.classes,
        protocol=protocol,
        depth_range=data.depth_range,
    )
