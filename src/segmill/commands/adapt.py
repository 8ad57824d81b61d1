"""`segmill adapt`: methods side by side on corrupted images, same order, seed and checkpoint."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import lightning
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from segmill.commands.adapt_parts import MIXED, AdaptParts, build_adapt_parts
from segmill.commands.adapt_pictures import Pictures
from segmill.commands.adapt_report import write_results
from segmill.commands.adapt_rows import Row, rows_of, saved_rows
from segmill.commands.classifier_view import follow_timm
from segmill.commands.run_folder import new_run_folder, write_provenance
from segmill.commands.trainer import build_loggers, finish_loggers
from segmill.configuration import Invocation, build
from segmill.data.tasks import Task
from segmill.tta.log import TaskLog, log_summary
from segmill.tta.method import Method, Waits
from segmill.tta.results import SOURCE, MethodResult, TaskResult, load_task, save_task
from segmill.tta.sharing import shared_images

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:
    """Adapt by every method of the comparison; leaves tables, a report and what was logged."""
    compare(config, context)


def compare(config: DictConfig, context: Invocation) -> list[MethodResult]:
    """The same, and what came out; nothing of a trial run."""
    resumed = None if config.resume is None else Path(config.resume)
    if resumed is None:
        rows = rows_of(config, context)
        follow_timm(config, [row.config for row in rows.values()])
    else:
        config, rows = saved_rows(resumed, context)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    parts = build_adapt_parts(config)
    methods = parts.methods(rows)
    if parts.settings.fast_dev_run:
        _fast_dev_run(parts, rows, methods)
        return []
    folder = resumed or new_run_folder(config.output_dir, run_name(config, rows))
    parts.module.evidence = folder / "evidence"
    if resumed is None and parts.is_first_process:
        config.methods = list(rows)
        write_provenance(folder, config, context.command)
        for row in rows.values():
            path = folder / row.name / "config.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(OmegaConf.to_yaml(row.config, resolve=True), encoding="utf-8")
    log.info("Run folder: %s\n%s", folder, parts.summary())
    _warn_of_few_images(parts, rows, methods)
    _warn_of_waiting(parts, rows, methods)
    shown = [MIXED] if config.tta.mixed else parts.data.tasks  # all: parts of a run agree on them
    images = parts.images_of(mixed=config.tta.mixed)
    pictures = Pictures(folder, shown, count=config.pictures, images=images)
    try:
        results = [_adapt(row, methods[row.name], parts, folder, pictures) for row in rows.values()]
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        log.info("Finished tasks are kept. Go on with: segmill adapt resume=%s", folder)
        raise
    if parts.is_first_process:
        write_results(folder, results, parts, rows, pictures, config)
        log.info("Next: open %s", folder / "report.html")
    return results


def run_name(config: DictConfig, rows: Collection[str]) -> str:
    """`experiment.name`, else method, data and seed."""
    if config.experiment.name is not None:
        return str(config.experiment.name)
    compared = [name for name in rows if name != SOURCE] or [SOURCE]
    method = compared[0] if len(compared) == 1 else "comparison"
    return f"adapt_{method}_{config.data.name}_seed{config.seed}"


def _warn_of_few_images(
    parts: AdaptParts, rows: Mapping[str, Row], methods: Mapping[str, Method]
) -> None:
    """What is learnt from the last images of a stream shows in no prediction."""
    late = [
        name
        for name, row in rows.items()
        if parts.learns(row, methods[name])
        and shared_images(methods[name]) != "alone"  # learns every image by itself
        and not row.tta.continual
        and (row.tta.predict, row.tta.max_epochs) == ("before", 1)
    ]
    images = parts.images_of(mixed=any(row.tta.mixed for row in rows.values()))
    if late and one_step_takes(images, batch=parts.effective_batch, processes=parts.sharing):
        log.warning(
            "%s: a task has %d images and an optimizer step takes %d, so no prediction comes from "
            "adapted weights. Take more images (limit), or a smaller data.batch_size or "
            "trainer.accumulate.",
            *(", ".join(late), images, max(images, parts.effective_batch)),
        )


def one_step_takes(images: int, *, batch: int, processes: int) -> bool:
    """Whether a task is one step; what is left of too few for all processes is part of it."""
    return images < batch + processes


def _warn_of_waiting(
    parts: AdaptParts, rows: Mapping[str, Row], methods: Mapping[str, Method]
) -> None:
    """A method that waits for more images than it will see learns nothing at all."""
    for name, row in rows.items():
        method = methods[name]
        images = parts.images_of(mixed=row.tta.mixed) * row.tta.max_epochs
        if row.tta.continual:
            images *= len(parts.streams(mixed=False))
        if isinstance(method, Waits) and method.waits_for >= images:
            log.warning(
                "%s learns nothing: it only looks on for %d images, and starts anew after %d. Take "
                "more images (limit, tta.continual=true), or lower its number in tta.method.",
                *(name, method.waits_for, images),
            )


def _adapt(
    row: Row, method: Method, parts: AdaptParts, folder: Path, pictures: Pictures
) -> MethodResult:
    """All tasks of one method, in order; a finished task of an interrupted run is read."""
    own = folder / row.name
    tasks = parts.streams(mixed=row.tta.mixed)
    done = _finished(own, tasks, independent=not row.tta.continual)
    loggers: list[Logger] = []
    if len(done) < len(tasks) and parts.is_first_process:
        loggers = build_loggers(build(row.config.logging), own, group=folder.name)
    parts.begin(row, method)
    found = list(done)
    for task in tasks[len(done) :]:
        if not row.tta.continual:
            parts.module.reset()
        first = _seen(row, found)
        found.append(_fit(row, parts, task, first, loggers, pictures, own))
        if parts.is_first_process:
            save_task(own, found[-1])
    result = MethodResult(name=row.name, tasks=tuple(found), order=parts.data.order_hash())
    log_summary(loggers, result, step=_seen(row, found))
    finish_loggers(loggers)
    return result


def _seen(row: Row, tasks: Sequence[TaskResult]) -> int:
    """Images that the loggers' step has counted."""
    return sum(len(task.names) for task in tasks) * row.tta.max_epochs


def _fit(
    row: Row,
    parts: AdaptParts,
    task: Task,
    first: int,
    loggers: list[Logger],
    pictures: Pictures,
    folder: Path,
) -> TaskResult:
    """One Trainer for one task."""
    module = parts.module
    module.task = task
    if parts.is_first_process or parts.sharing > 1:
        module.on_images = pictures.keep_for(row.name, task)
    callback = TaskLog(
        task,
        first=first,
        images=parts.images_of(mixed=row.tta.mixed),
        processes=parts.sharing,
        every=parts.settings.log_every,
        loggers=loggers,
        line=f"{row.name}  {task.name}",
    )
    trainer = parts.settings.trainer(folder, epochs=row.tta.max_epochs, callbacks=[callback])
    loader = parts.loader(task, mixed=row.tta.mixed)
    trainer.fit(module, train_dataloaders=loader)
    return module.record.result(task=task.name, corruption=task.corruption, severity=task.severity)


def _finished(folder: Path, tasks: Sequence[Task], *, independent: bool) -> list[TaskResult]:
    """Results on disk; a continual run starts again unless it got through, as weights are gone."""
    found: list[TaskResult] = []
    for task in tasks:
        result = load_task(folder, task.name)
        if result is None:
            break
        found.append(result)
    return found if independent or len(found) == len(tasks) else []


def _fast_dev_run(
    parts: AdaptParts, rows: Mapping[str, Row], methods: Mapping[str, Method]
) -> None:
    """One step of the first task for every method; nothing is written."""
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Pictures(Path(scratch), [], count=0, images=1)
        for row in rows.values():
            parts.begin(row, methods[row.name])
            task = parts.streams(mixed=row.tta.mixed)[0]
            result = _fit(row, parts, task, 0, [], pictures, Path(scratch))
            log.info("%s: loss %.4f, %.2f seconds", row.name, result.loss, result.seconds)
    log.info("fast_dev_run: one step went through every method.")
