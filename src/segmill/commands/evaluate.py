"""`segmill eval`: score a run or a checkpoint under a named protocol and write the evidence."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from segmill.checkpoint.load import load_weights
from segmill.commands.reporting import Scored, report
from segmill.commands.run_folder import new_run_folder, write_provenance
from segmill.commands.trainer import build_trainer
from segmill.commands.trainer_settings import LoggingSettings, TrainerSettings
from segmill.configuration import Invocation, build, plain
from segmill.data.datamodule import SegmentationData
from segmill.errors import SegmillError
from segmill.evaluation import EvaluationModule
from segmill.models.discriminative import Discriminative
from segmill.protocol import Protocol
from segmill.segmenter import Segmenter, open_segmenter

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:
    """Score `run=` (a run folder or model.safetensors), or `model=` with `weights=`."""
    config = _with_run(config, context)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    protocol: Protocol = build(config.protocol)
    data: SegmentationData = build(
        config.data, protocol=protocol, seed=config.seed, accumulate=1, start_step=0
    )
    split = config.split or data.val_split
    segmenter = _segmenter(config, data, protocol)
    data.dataset(split)  # a split that does not exist is refused before a folder is made
    folder = _result_folder(config, data, split, protocol)
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
    trainer: lightning.Trainer, segmenter: Segmenter, data: SegmentationData, *, split: str
) -> Scored:
    """Score every image of `split` once, on all processes of `trainer`."""
    module = EvaluationModule(
        model=segmenter.model, protocol=segmenter.protocol, class_names=segmenter.classes.names
    )
    started = time.perf_counter()
    trainer.test(module, dataloaders=data.eval_loader(split), verbose=False)
    seconds = time.perf_counter() - started
    return Scored(
        data_name=data.name,
        split=split,
        dataset=data.dataset(split),
        classes=segmenter.classes,
        protocol=segmenter.protocol,
        confusion=module.confusion,
        per_image=module.per_image,
        seconds=seconds,
        predict=lambda image: segmenter.predict(image).label,
    )


def _segmenter(config: DictConfig, data: SegmentationData, protocol: Protocol) -> Segmenter:
    if config.run is not None:
        segmenter = replace(open_segmenter(config.run), protocol=protocol)
        _same_classes(segmenter, data)
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


def _same_classes(segmenter: Segmenter, data: SegmentationData) -> None:
    if len(segmenter.classes) != len(data.classes):
        raise SegmillError(
            f"The model has {len(segmenter.classes)} classes, data={data.name} has "
            f"{len(data.classes)}: a score would compare different things. Choose the data set "
            f"that the model was trained for."
        )


def _with_run(config: DictConfig, context: Invocation) -> DictConfig:
    """Take the data of the run that is evaluated, unless data=... was given; values still win."""
    if config.run is None or any(item.startswith("data=") for item in context.overrides):
        return config
    path = Path(config.run)
    saved = (path if path.is_dir() else path.parent) / "config.yaml"
    if not saved.is_file():
        return config
    known = OmegaConf.load(saved)
    chosen = OmegaConf.create({"data": known.data})
    for override in context.overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("data."):
            OmegaConf.update(chosen, key, OmegaConf.select(config, key))
    merged = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    merged.data = chosen.data
    assert isinstance(merged, DictConfig)
    return merged


def _result_folder(
    config: DictConfig, data: SegmentationData, split: str, protocol: Protocol
) -> Path:
    """Beside the run that was scored; every evaluation has a folder of its own."""
    name = f"eval_{data.name}_{split}_{protocol.name}"
    if config.run is not None and Path(config.run).exists():
        path = Path(config.run)
        return new_run_folder(str(path if path.is_dir() else path.parent), name)
    return new_run_folder(config.output_dir, f"{config.model_name}_{name}")
