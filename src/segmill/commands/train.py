"""`segmill train`: build the parts, fit, then score the best checkpoint on val and report."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from omegaconf import DictConfig

from segmill.callbacks import SaveOnInterrupt
from segmill.checkpoint.lightning_state import write_lightning_state
from segmill.checkpoint.load import load_weights, shapes_of
from segmill.checkpoint.read import read_any
from segmill.checkpoint.training_state import (
    network_weights,
    read_training_state,
    require_same_network,
    steps_of,
)
from segmill.commands.evaluate import score
from segmill.commands.plan import dry_run
from segmill.commands.reporting import report
from segmill.commands.run_config import (
    require_steps_to_take,
    resume_point,
    resumed_config,
    run_name,
)
from segmill.commands.run_folder import new_run_folder, write_provenance
from segmill.commands.trainer import (
    LoggingSettings,
    TrainerSettings,
    build_trainer,
    world_size,
)
from segmill.configuration import Invocation, build, plain
from segmill.data.datamodule import SegmentationData
from segmill.data.image_datamodule import TrainingData
from segmill.errors import SegmillError
from segmill.models.discriminative import Discriminative
from segmill.segmenter import Segmenter, save_segmenter
from segmill.training import SegmentationModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a training run is made of, built from its configuration."""

    segmenter: Segmenter
    data: TrainingData
    module: SegmentationModule
    settings: TrainerSettings
    weights: str


def run(config: DictConfig, context: Invocation) -> None:
    """Train, or with `--dry-run` only print the plan and take one step."""
    resume = None
    if config.resume is not None:
        resume = resume_point(Path(config.resume))
        config = resumed_config(resume.parent, config, context)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    if context.dry_run:
        dry_run(config, build_parts(config, evidence=Path("evidence"), start_step=0))
        return
    start_step = 0 if resume is None else steps_of(resume) or 0
    parts = build_parts(config, evidence=Path("evidence"), start_step=start_step)
    start = parts.weights
    if resume is not None:
        steps = parts.settings.max_steps
        require_steps_to_take(resume, done=start_step, max_steps=steps, runtime="torch")
        start = f"Going on at step {start_step}."
    if parts.settings.fast_dev_run:
        with tempfile.TemporaryDirectory() as scratch:
            state = None if resume is None else _for_lightning(resume, parts, Path(scratch))
            fit(parts, config, Path(scratch), state)
        log.info("fast_dev_run: one step of training and validation went through.")
        return
    # Only now: a run that cannot be built leaves no folder behind.
    folder = resume.parent if resume else new_run_folder(config.output_dir, run_name(config))
    state = None if resume is None else _for_lightning(resume, parts, folder)
    parts.module.evidence = folder / "evidence"
    if resume is None:
        write_provenance(folder, config, context.command)
    log.info("Run folder: %s\n%s", folder, start)
    trainer = fit(parts, config, folder, state)
    scored = score(trainer, parts.segmenter, parts.data, split=parts.data.val_split)
    if trainer.is_global_zero:
        report(scored, folder)
        test = parts.data.test_split or parts.data.val_split
        views = " protocol=ms_flip" if isinstance(parts.data, SegmentationData) else ""
        log.info("Next: segmill eval run=%s split=%s%s", folder, test, views)


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
    data: TrainingData = build(
        config.data,
        protocol=protocol,
        seed=config.seed,
        accumulate=settings.accumulate,
        start_step=start_step,
    )
    if settings.max_steps < 1:  # evaluation has none
        raise SegmillError(f"trainer.max_steps={settings.max_steps} should be 1 or more.")
    data.require_shares(world_size(settings))
    for split in (data.train_split, data.val_split):
        data.dataset(split)  # missing files are named before anything is made
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
        seed=config.seed,
        evidence=evidence,
    )
    return Parts(segmenter, data, module, settings, weights)


def _keep_best(parts: Parts, folder: Path) -> None:
    """Put the best checkpoint's weights into the model, and into model.safetensors."""
    best = folder / "best.ckpt"
    state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    parts.module.load_state_dict(state)
    parts.segmenter.model.eval()
    if parts.module.global_rank == 0:
        save_segmenter(folder / "model.safetensors", parts.segmenter)


def _for_lightning(resume: Path, parts: Parts, folder: Path) -> Path:
    """The state in Lightning's form: what Jittor wrote is carried over into a file in `folder`."""
    network = parts.module.model.network
    if resume.suffix != ".pkl":
        require_same_network(network_weights(read_any(resume)), shapes_of(network))
        return resume
    carried = folder / "carried.ckpt"
    write_lightning_state(
        carried,
        read_training_state(resume),
        network=network,
        optimizer=parts.module.optimizer_settings.build(network),
    )
    log.info(
        "%s is Jittor's: weights, AdamW's moments and the step go on here; random draws start anew "
        "and the best checkpoint is chosen among what follows.",
        resume,
    )
    return carried
