"""`segmill eval`: score a run or a checkpoint under a named protocol and write the evidence."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import lightning
import torch
from omegaconf import DictConfig

from segmill.checkpoint.load import load_weights
from segmill.commands.reporting import Scored, report, result_folder
from segmill.commands.run_config import config_of_run, require_same_classes
from segmill.commands.run_folder import write_provenance
from segmill.commands.trainer import build_trainer
from segmill.commands.trainer_settings import LoggingSettings, TrainerSettings
from segmill.configuration import Invocation, build, plain
from segmill.data.image_datamodule import ImageData, TrainingData
from segmill.errors import SegmillError
from segmill.evaluation import EvaluationModule
from segmill.models.discriminative import Discriminative
from segmill.protocol import Protocol
from segmill.segmenter import Segmenter, open_segmenter

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:
    """Score `run=` (a run folder or model.safetensors), or `model=` with `weights=`."""
    config = config_of_run(config, context)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    protocol: Protocol = build(config.protocol)
    data: TrainingData = build(
        config.data, protocol=protocol, seed=config.seed, accumulate=1, start_step=0
    )
    split = config.split or data.val_split
    segmenter = _segmenter(config, data, protocol)
    data.dataset(split)  # a split that does not exist is refused before a folder is made
    folder = result_folder(config, data, split, protocol)
    write_provenance(folder, config, context.command)
    settings: TrainerSettings = build(config.trainer)
    logging_settings = LoggingSettings.silent()
    trainer = build_trainer(settings, logging_settings, folder, extra_callbacks=[])
    scored = score(trainer, segmenter, data, split=split)
    if trainer.is_global_zero:
        report(scored, folder)
        source = config.run or f"{config.model_name} weights={config.weights}"
        log.info("Next: open %s, or segmill predict run=%s IMAGE", folder / "report.html", source)


def score(
    trainer: lightning.Trainer, segmenter: Segmenter, data: TrainingData, *, split: str
) -> Scored:
    """Score every image of `split` once, on all processes of `trainer`."""
    module = EvaluationModule(
        model=segmenter.model,
        protocol=segmenter.protocol,
        class_names=segmenter.classes.names,
        one_label=isinstance(data, ImageData),
    )
    started = time.perf_counter()
    trainer.test(module, dataloaders=data.eval_loader(split), verbose=False)
    seconds = time.perf_counter() - started
    return Scored(
        data_name=str(data.name),
        split=split,
        dataset=data.dataset(split),
        classes=segmenter.classes,
        protocol=segmenter.protocol,
        confusion=module.confusion,
        per_image=module.per_image,
        seconds=seconds,
        image_counts=module.image_counts,
        predict=lambda image: segmenter.predict(image).label,
    )


def _segmenter(config: DictConfig, data: TrainingData, protocol: Protocol) -> Segmenter:
    if config.run is not None:
        segmenter = replace(open_segmenter(config.run), protocol=protocol)
        require_same_classes(segmenter.classes, data)
    else:
        model: Discriminative = build(config.model)
        if config.weights is None:
            raise SegmillError(
                "Nothing to evaluate: give run=runs/NAME, or model=NAME weights=FILE."
            )
        load_weights(
            model.network,
            config.weights,
            may_miss=tuple(config.weights_may_miss),
            may_leave=tuple(config.weights_may_leave),
        )
        segmenter = Segmenter(
            model.eval(), data.classes, protocol, plain(config.model), data.depth_range
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return segmenter.to(device) if config.trainer.accelerator != "cpu" else segmenter
