"""Lightning callbacks of a training run: progress, waiting for data, the last step, Ctrl-C."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from segmill.validation import ValidationSchedule

log = logging.getLogger(__name__)


class Progress(TQDMProgressBar):
    """One line with loss, learning rate, seconds waiting for data and the last mIoU."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, Any]:
        """Short names; Lightning's version number says nothing here."""
        values = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): v for name, v in values.items() if name != "v_num"}


class ProgressLines(Callback):
    """The same as text, about forty times a run, for a log file or a pipe."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_step = 0

    def on_train_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
    ) -> None:
        """Time counts from here; a resumed run starts at its own step."""
        self._started, self._first_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """A line every fortieth of the run."""
        step, last = trainer.global_step, int(trainer.max_steps)
        if not trainer.is_global_zero or step % max(last // 40, 1):
            return
        pace = (time.perf_counter() - self._started) / max(step - self._first_step, 1)
        shown = {
            name.removeprefix("train/"): float(value)
            for name, value in trainer.progress_bar_metrics.items()
        }
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        log.info("step %d/%d  %s  %.0f s left", step, last, values, pace * (last - step))


class DataTime(Callback):
    """Log `train/data_time`: seconds per step that training waited for the loader."""

    def __init__(self) -> None:
        self._since: float | None = None

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """The batch is here."""
        if self._since is not None:
            pl_module.log("train/data_time", time.perf_counter() - self._since, prog_bar=True)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Waiting begins."""
        self._since = time.perf_counter()

    def on_validation_end(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
    ) -> None:
        """Validation is not waiting."""
        self._since = None


class ScoreLastStep(Callback):
    """Validate after the last step too, so that `val_every` need not divide `max_steps`."""

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Lightning validates before a stop that was asked for, not before `max_steps`."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class SkipValidations(Callback):
    """Of the validations that Lightning would run, only those of a schedule and the last one."""

    def __init__(self, schedule: ValidationSchedule) -> None:
        self._schedule = schedule
        self._limit: int | float = 1.0

    def on_fit_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
    ) -> None:
        """The limit of a whole validation, which a trial run has lowered."""
        self._limit = trainer.limit_val_batches

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Lightning asks whether to validate after this hook, and never with a limit of 0."""
        step = trainer.global_step
        wanted = self._schedule.due(step) or step >= trainer.max_steps
        trainer.limit_val_batches = self._limit if wanted else 0

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Leave the trainer as it was."""
        trainer.limit_val_batches = self._limit


class SaveOnInterrupt(Callback):
    """Ctrl-C writes `last.ckpt` and says how to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """Only for the user's own interrupt: a broken run must not overwrite a good checkpoint."""
        if isinstance(exception, KeyboardInterrupt):
            trainer.save_checkpoint(self.folder / "last.ckpt")
            log.warning(
                "Stopped at step %d; last.ckpt is written. Go on with:\n  segmill train resume=%s",
                trainer.global_step,
                self.folder,
            )
