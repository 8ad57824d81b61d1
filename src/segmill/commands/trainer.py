"""Lightning's Trainer and loggers, of what configs/trainer and configs/logging say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch.optim.swa_utils import get_ema_multi_avg_fn

from segmill.callbacks import (
    DataTime,
    Progress,
    ProgressLines,
    ScoreLastStep,
    SkipValidations,
)
from segmill.commands.accounts import has_wandb_key
from segmill.commands.quiet import quiet_lightning
from segmill.commands.run_folder import keep_older_metrics
from segmill.commands.trainer_settings import LoggingSettings, TrainerSettings, WandbSettings

# Settings are named here too: the configurations of older runs do so.
__all__ = [
    "LoggingSettings",
    "TrainerSettings",
    "WandbSettings",
    "build_loggers",
    "build_trainer",
    "finish_loggers",
    "world_size",
]


class Layout(Callback):
    """Puts the network into the memory layout and the compiled form that the settings ask for."""

    def __init__(self, *, channels_last: bool, compiled: bool) -> None:
        self.channels_last = channels_last
        self.compiled = compiled

    def setup(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,
        stage: str,  # noqa: ARG002
    ) -> None:
        """Before the module moves to its device; the parameters' names stay as they are."""
        if self.channels_last:
            pl_module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.compiled:
            # Training enters a network by its losses, so it is the trunk that both ways share.
            network: Any = pl_module.model.network  # pyright: ignore[reportAttributeAccessIssue]
            network.backbone.compile()


def build_trainer(
    settings: TrainerSettings,
    logging_settings: LoggingSettings,
    folder: Path,
    *,
    extra_callbacks: Sequence[Callback],
) -> lightning.Trainer:
    """Lightning's Trainer that writes metrics.csv, best.ckpt (by val/mIoU) and last.ckpt."""
    quiet_lightning()
    processes = world_size(settings)
    gpus = _on_gpu(settings)
    return lightning.Trainer(
        accelerator=settings.accelerator,
        devices=_devices(settings),
        num_nodes=settings.nodes,
        strategy="ddp" if processes > 1 else "auto",
        precision=settings.precision,
        max_steps=settings.max_steps,
        max_epochs=-1,
        val_check_interval=settings.val_every * settings.accumulate,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        # torch has SyncBatchNorm for GPUs only: on the CPU every process normalises its own share.
        sync_batchnorm=processes > 1 and gpus and settings.sync_batchnorm is not False,
        deterministic=settings.deterministic,
        benchmark=settings.benchmark and not settings.deterministic,
        log_every_n_steps=settings.log_every,
        enable_progress_bar=_has_bar(settings),
        enable_model_summary=False,
        fast_dev_run=settings.fast_dev_run,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module hands out each rank's samples itself
        logger=build_loggers(logging_settings, folder, group=None),
        callbacks=[*_callbacks(settings, folder), *extra_callbacks],
        default_root_dir=folder,
    )


def world_size(settings: TrainerSettings) -> int:
    """Processes of the run: devices of one node times nodes."""
    devices = _devices(settings)
    return (devices if isinstance(devices, int) else len(devices)) * settings.nodes


def _devices(settings: TrainerSettings) -> int | list[int]:
    if isinstance(settings.devices, int):
        return settings.devices
    if settings.devices == "auto":
        return 1 if settings.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    return [int(index) for index in settings.devices]


def _callbacks(settings: TrainerSettings, folder: Path) -> list[Callback]:
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="val/mIoU",
        mode="max",
        enable_version_counter=False,
    )
    # Not `save_last`, which writes only when the best one is written.
    last = ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)
    layout = Layout(channels_last=settings.channels_last, compiled=settings.compile)
    callbacks: list[Callback] = [layout, DataTime(), ScoreLastStep(), best, last]
    if settings.validation is not None:
        callbacks.append(SkipValidations(settings.validation))
    if settings.progress:
        callbacks.append(Progress() if _has_bar(settings) else ProgressLines())
    if settings.ema is not None:
        # One kernel for all parameters; Lightning's EMAWeightAveraging takes one for each.
        average = get_ema_multi_avg_fn(settings.ema)
        # Lightning copies before the model moves; by then the device of this process is set.
        device = "cuda" if _on_gpu(settings) else "cpu"
        callbacks.append(WeightAveraging(device, use_buffers=True, multi_avg_fn=average))
    return callbacks


def _on_gpu(settings: TrainerSettings) -> bool:
    return settings.accelerator != "cpu" and torch.cuda.is_available()


def _has_bar(settings: TrainerSettings) -> bool:
    """A bar is for a terminal; a log file gets a line now and then."""
    return settings.progress and sys.stdout.isatty()


def build_loggers(settings: LoggingSettings, folder: Path, *, group: str | None) -> list[Logger]:
    """metrics.csv, and what the settings add; `group` puts several runs together in W&B."""
    keep_older_metrics(folder)
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    if settings.wandb.enabled:
        loggers.append(_wandb(settings.wandb, folder, group))
    return loggers


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Write everything, and end the W&B run so that the next one can begin in this process."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _wandb(settings: WandbSettings, folder: Path, group: str | None) -> WandbLogger:
    online = settings.mode == "online" or (settings.mode == "auto" and has_wandb_key())
    return WandbLogger(
        name=folder.name if group is None else f"{group}_{folder.name}",
        group=group,
        save_dir=folder,
        project=settings.project,
        entity=settings.entity,
        offline=not online,
    )
