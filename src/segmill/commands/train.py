"""`segmill train`: build the parts, fit, then score the best checkpoint on val and report."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from segmill.callbacks import SaveOnInterrupt
from segmill.checkpoint.load import load_weights
from segmill.checkpoint.read import read_any
from segmill.commands.evaluate import score
from segmill.commands.plan import dry_run
from segmill.commands.reporting import report
from segmill.commands.run_folder import new_run_folder, write_provenance
from segmill.commands.trainer import (
    LoggingSettings,
    TrainerSettings,
    build_trainer,
    world_size,
)
from segmill.configuration import Invocation, build, plain
from segmill.data.datamodule import SegmentationData
from segmill.errors import SegmillError
from segmill.models.discriminative import Discriminative
from segmill.segmenter import Segmenter, save_segmenter
from segmill.training import SegmentationModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a training run is made of, built from its configuration."""

    segmenter: Segmenter
    data: SegmentationData
    module: SegmentationModule
    settings: TrainerSettings
    weights: str


def run(config: DictConfig, context: Invocation) -> None:
    """Train, or with `--dry-run` only print the plan and take one step."""
    resume = None
    if config.resume is not None:
        resume = _resume_point(Path(config.resume))
        config = _resumed_config(resume.parent, config, context)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    if context.dry_run:
        dry_run(config, build_parts(config, evidence=Path("evidence"), start_step=0))
        return
    start_step = 0 if resume is None else int(_header(resume)["global_step"])
    parts = build_parts(config, evidence=Path("evidence"), start_step=start_step)
    if parts.settings.fast_dev_run:
        with tempfile.TemporaryDirectory() as scratch:
            fit(parts, config, Path(scratch), resume)
        log.info("fast_dev_run: one step of training and validation went through.")
        return
    # Only now: a run that cannot be built leaves no folder behind.
    folder = resume.parent if resume else new_run_folder(config.output_dir, run_name(config))
    parts.module.evidence = folder / "evidence"
    if resume is None:
        write_provenance(folder, config, context.command)
    log.info("Run folder: %s\n%s", folder, parts.weights)
    trainer = fit(parts, config, folder, resume)
    scored = score(trainer, parts.segmenter, parts.data, split=parts.data.val_split)
    if trainer.is_global_zero:
        report(scored, folder)
        test = parts.data.test_split or parts.data.val_split
        log.info("Next: segmill eval run=%s split=%s protocol=ms_flip", folder, test)


def fit(parts: Parts, config: DictConfig, folder: Path, resume: Path | None) -> lightning.Trainer:
    """Fit, then put the best checkpoint's weights into the model and into model.safetensors."""
    logging_settings: LoggingSettings = build(config.logging)
    trainer = build_trainer(
        parts.settings, logging_settings, folder, extra_callbacks=[SaveOnInterrupt(folder)]
    )
    trainer.fit(
        parts.module,
        datamodule=parts.data,
        ckpt_path=None if resume is None else str(resume),
        weights_only=True,
    )
    if not parts.settings.fast_dev_run:
        _keep_best(parts, folder)
    return trainer


def build_parts(config: DictConfig, *, evidence: Path, start_step: int) -> Parts:
    """Instantiate data, model, optimizer and module; load the weights that were asked for."""
    settings: TrainerSettings = build(config.trainer)
    protocol = build(config.protocol)
    data: SegmentationData = build(
        config.data,
        protocol=protocol,
        seed=config.seed,
        accumulate=settings.accumulate,
        start_step=start_step,
    )
    if settings.max_steps < 1:  # evaluation has none
        raise SegmillError(f"trainer.max_steps={settings.max_steps} should be 1 or more.")
    data.require_shares(world_size(settings))
    model: Discriminative = build(config.model)
    weights = f"{sum(p.numel() for p in model.network.parameters()):,} parameters, random start"
    if config.weights is not None:
        report = load_weights(
            model.network,
            config.weights,
            may_miss=tuple(config.weights_may_miss),
            may_leave=tuple(config.weights_may_leave),
        )
        weights = f"{report.text()}\nModel-only weights: training starts at step 0."
    segmenter = Segmenter(
        model=model,
        classes=data.classes,
        protocol=protocol,
        config=plain(config.model),
        depth_range=data.depth_range,
    )
    module = SegmentationModule(
        model=model,
        optimizer=build(config.optimizer),
        schedule=build(config.schedule),
        protocol=protocol,
        class_names=data.classes.names,
        max_steps=settings.max_steps,
        evidence=evidence,
    )
    return Parts(segmenter, data, module, settings, weights)


def run_name(config: DictConfig) -> str:
    """`experiment.name`, else model, data and seed."""
    if config.experiment.name is not None:
        return str(config.experiment.name)
    return f"{config.model_name}_{config.data.name}_seed{config.seed}"


def _keep_best(parts: Parts, folder: Path) -> None:
    """Put the best checkpoint's weights into the model, and into model.safetensors."""
    best = folder / "best.ckpt"
    state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    parts.module.load_state_dict(state)
    parts.segmenter.model.eval()
    if parts.module.global_rank == 0:
        save_segmenter(folder / "model.safetensors", parts.segmenter)


def _resume_point(path: Path) -> Path:
    """The checkpoint to go on from: `last.ckpt` of a run folder, or a .ckpt itself."""
    checkpoint = path / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise SegmillError(
            f"resume={path}: {checkpoint} does not exist. Give a run folder that has a last.ckpt, "
            f"or start again without resume."
        )
    if "global_step" not in _header(checkpoint):
        raise SegmillError(
            f"resume={path}: this file holds weights only, no optimizer and no step, so there is "
            f"nothing to go on from. Use weights={path} to start at step 0 from these weights."
        )
    return checkpoint


def _header(checkpoint: Path) -> Mapping[str, Any]:
    """The training state's top level; reading it whole first refuses a truncated file."""
    tree = read_any(checkpoint)
    return tree if isinstance(tree, Mapping) else {}


def _resumed_config(folder: Path, config: DictConfig, context: Invocation) -> DictConfig:
    """The run's own configuration; single values of the new command win, groups may not change."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise SegmillError(f"resume: {saved} is missing, so the run's configuration is unknown.")
    known = OmegaConf.load(saved)
    changed = OmegaConf.create({})
    for override in context.overrides:
        key = override.partition("=")[0]
        if key in {"resume", "output_dir"}:
            continue
        if "." not in key and key != "seed":
            raise SegmillError(
                f"resume continues a run as it was; {override} would make it another one. "
                f"Leave it out, or start a new run with weights={folder}/model.safetensors."
            )
        OmegaConf.update(changed, key, OmegaConf.select(config, key))
    merged = OmegaConf.merge(known, changed)
    assert isinstance(merged, DictConfig)
    return merged
