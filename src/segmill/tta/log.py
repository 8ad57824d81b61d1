"""Running scores of a task: to the loggers on the task's own axis, and into the progress line."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger

from segmill.data.tasks import Task
from segmill.tta.module import TTAModule
from segmill.tta.results import MethodResult

log = logging.getLogger(__name__)


class TaskLog(Callback):
    """Writes `tta/03_motion_blur_5/mIoU` and `/loss` over `/image`, the number of images so far.

    The number grows from epoch to epoch. `first` is that of the tasks before: loggers want one step
    that only grows.
    """

    def __init__(
        self,
        task: Task,
        *,
        first: int,
        every: int,
        loggers: list[Logger],
        line: str,
    ) -> None:
        self._task, self._first, self._every = task, first, every
        self._loggers, self._line = loggers, line

    def on_train_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
    ) -> None:
        """Give the task its own axis in W&B."""
        if not trainer.is_global_zero:
            return
        for logger in self._loggers:
            if isinstance(logger, WandbLogger):
                axis = f"tta/{self._task.name}/image"
                logger.experiment.define_metric(axis)
                logger.experiment.define_metric(f"tta/{self._task.name}/*", step_metric=axis)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Every so many images, at the first one, and at the last: the task's score."""
        if batch_idx % self._every == 0 or batch_idx + 1 == trainer.num_training_batches:
            self._write(trainer, pl_module)

    def on_train_end(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
    ) -> None:
        """What was logged is on disk."""
        for logger in self._loggers:
            logger.save()

    def _write(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, TTAModule)
        record, total = module.record, int(trainer.num_training_batches)
        images, miou, loss = len(record.names), record.miou(), record.mean_loss()
        seen = trainer.current_epoch * total + images
        values = {"mIoU": miou, "loss": loss, "image": float(seen)}
        for logger in self._loggers:
            logger.log_metrics(
                {f"tta/{self._task.name}/{key}": value for key, value in values.items()},
                step=self._first + seen,
            )
        if trainer.is_global_zero:
            log.info("%s  %d/%d  mIoU %.2f  loss %.4f", self._line, images, total, 100 * miou, loss)


def log_summary(loggers: Sequence[Logger], result: MethodResult, *, step: int) -> None:
    """The end of a method: the mean of its tasks, and in W&B a table of them."""
    means = {f"tta/{name}": value for name, value in result.scores.items() if math.isfinite(value)}
    for logger in loggers:
        logger.log_metrics(means, step=step)
        if isinstance(logger, WandbLogger):
            columns = ["task", "mIoU", "loss", "seconds per image"]
            rows = [[task.task, task.mIoU, task.loss, task.seconds] for task in result.tasks]
            logger.log_table("tta/tasks", columns=columns, data=rows)
