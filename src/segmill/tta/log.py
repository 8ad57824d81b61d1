"""Running scores of a task: to the loggers on the task's own axis, and into the progress line."""

from __future__ import annotations

import logging
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger

from segmill.data.tasks import Task
from segmill.tta.module import TTAModule

log = logging.getLogger(__name__)


class TaskLog(Callback):
    """Writes `tta/03_motion_blur_5/mIoU` and `/loss` over `/image`, the number of images so far.

    `first` is the number of images of the tasks before: loggers want one step that only grows.
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
        """Every so many images, and at the first one."""
        if batch_idx % self._every == 0:
            self._write(trainer, pl_module)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The task's final score is always written."""
        self._write(trainer, pl_module)
        for logger in self._loggers:
            logger.save()

    def _write(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, TTAModule)
        images, miou, loss = (
            len(module.record.names),
            module.record.miou(),
            module.record.mean_loss(),
        )
        values = {"mIoU": miou, "loss": loss, "image": float(images)}
        for logger in self._loggers:
            logger.log_metrics(
                {f"tta/{self._task.name}/{key}": value for key, value in values.items()},
                step=self._first + images,
            )
        if trainer.is_global_zero:
            total = int(trainer.num_training_batches)
            log.info("%s  %d/%d  mIoU %.2f  loss %.4f", self._line, images, total, 100 * miou, loss)
