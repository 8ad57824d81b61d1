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

    The scores are those of the module's record: top1, top5 and ece of classification.

    The number grows from epoch to epoch. `first` is that of the tasks before: loggers want one step
    that only grows. `images` are those of an epoch; `every` counts batches. `processes` share the
    images: scores are those of this process's until the last batch, when the record gathers all.
    """

    def __init__(
        self,
        task: Task,
        *,
        first: int,
        images: int,
        processes: int,
        every: int,
        loggers: list[Logger],
        line: str,
    ) -> None:
        self._task, self._first, self._every = task, first, every
        self._images, self._processes = images, processes
        self._loggers, self._line = loggers, line
        self._due = False

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
        """The task's scores: every so many batches, from the first one on, and at the last.

        At the end of the optimizer's step, when its batches are counted.
        """
        assert isinstance(pl_module, TTAModule)
        last = batch_idx + 1 == trainer.num_training_batches
        if last and self._processes > 1:
            pl_module.record.gather()  # on every process, though one writes
        self._due |= batch_idx % self._every == 0
        if last or (self._due and pl_module.plan.ends_step(batch_idx)):
            self._write(trainer, pl_module)
            self._due = False

    def on_train_end(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
    ) -> None:
        """What was logged is on disk."""
        for logger in self._loggers:
            logger.save()

    def _write(self, trainer: lightning.Trainer, module: TTAModule) -> None:
        course, scores = module.record.course, module.record.scores()
        images = min(len(course.names) * self._processes, self._images)
        loss = course.mean_loss()
        seen = trainer.current_epoch * self._images + images
        values = {**scores, "loss": loss, "image": float(seen)}
        for logger in self._loggers:
            logger.log_metrics(
                {f"tta/{self._task.name}/{key}": value for key, value in values.items()},
                step=self._first + seen,
            )
        if trainer.is_global_zero:
            found = "  ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())
            log.info("%s  %d/%d  %s  loss %.4f", self._line, images, self._images, found, loss)


def log_summary(loggers: Sequence[Logger], result: MethodResult, *, step: int) -> None:
    """The end of a method: the mean of its tasks, and in W&B a table of them."""
    means = {f"tta/{name}": value for name, value in result.scores.items() if math.isfinite(value)}
    for logger in loggers:
        logger.log_metrics(means, step=step)
        if isinstance(logger, WandbLogger):
            columns = ["task", result.counts.headline, "loss", "seconds per image"]
            rows = [[task.task, task.score, task.loss, task.seconds] for task in result.tasks]
            logger.log_table("tta/tasks", columns=columns, data=rows)
