"""What the loggers get of a task: keys, axes, steps, and the table at the end."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from segmill.data.tasks import Task
from segmill.tta.log import TaskLog, log_summary
from segmill.tta.module import TTAModule
from segmill.tta.record import TaskRecord
from segmill.tta.results import MethodResult
from segmill.tta.source import Source
from tiny_adapt import tiny_model
from tiny_trainer import ONE_CPU, batches, module_of

TASKS = [Task(3, "motion_blur", 5), Task(4, "snow", 5)]


class FakeRun:
    """What wandb.init would return."""

    def __init__(self) -> None:
        self.axes: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric


class FakeWandb(WandbLogger):
    """A WandbLogger that opens no run."""

    def __init__(self) -> None:
        self.run = FakeRun()
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}

    @property
    def experiment(self) -> Any:
        return self.run

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def log_table(self, key: str, columns: Any = None, data: Any = None, **_: Any) -> None:
        self.tables[key] = (columns, data)

    def save(self) -> None:
        """Nothing is kept back."""


def adapt(
    folder: Path,
    loggers: list[Any],
    *,
    every: int,
    epochs: int = 1,
    processes: int = 1,
    accumulate: int = 1,
) -> TTAModule:
    """Two tasks of five images."""
    model = tiny_model()
    module = module_of(model, accumulate=accumulate)
    module.begin(Source(model=model), None, batch_statistics=False)
    for number, task in enumerate(TASKS):
        module.task = task
        line = f"source  {task.name}"
        first = 5 * epochs * number
        callback = TaskLog(
            task,
            first=first,
            images=5,
            processes=processes,
            every=every,
            loggers=loggers,
            line=line,
        )
        trainer = ONE_CPU.trainer(folder, epochs=epochs, callbacks=[callback])
        trainer.fit(module, train_dataloaders=batches(5))
    return module


def test_every_task_has_its_keys_and_its_own_axis(tmp_path: Path) -> None:
    logger = FakeWandb()
    adapt(tmp_path, [logger], every=2)
    assert logger.run.axes == {
        "tta/03_motion_blur_5/image": None,
        "tta/03_motion_blur_5/*": "tta/03_motion_blur_5/image",
        "tta/04_snow_5/image": None,
        "tta/04_snow_5/*": "tta/04_snow_5/image",
    }
    first = [values for _, values in logger.logged if "tta/03_motion_blur_5/mIoU" in values]
    assert set(first[0]) == {f"tta/03_motion_blur_5/{key}" for key in ("mIoU", "loss", "image")}
    # The first image, every second one after it, and the last.
    assert [values["tta/03_motion_blur_5/image"] for values in first] == [1, 3, 5]
    assert [step for step, _ in logger.logged] == [1, 3, 5, 6, 8, 10]


def test_batches_are_counted_and_logged_at_the_end_of_their_step(tmp_path: Path) -> None:
    logger = FakeWandb()
    adapt(tmp_path, [logger], every=1, accumulate=2)
    # Steps of two images, and what is left.
    assert [step for step, _ in logger.logged] == [2, 4, 5, 7, 9, 10]


def test_a_line_that_falls_inside_a_step_waits_for_its_end(tmp_path: Path) -> None:
    logger = FakeWandb()
    adapt(tmp_path, [logger], every=3, accumulate=2)
    assert [step for step, _ in logger.logged] == [2, 4, 5, 7, 9, 10]


def test_steps_grow_over_the_epochs(tmp_path: Path) -> None:
    logger = FakeWandb()
    adapt(tmp_path, [logger], every=4, epochs=2)
    assert [step for step, _ in logger.logged] == [1, 5, 6, 10, 11, 15, 16, 20]


def test_the_csv_file_has_the_same(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    adapt(tmp_path, [logger], every=1)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert all(row["tta/03_motion_blur_5/mIoU"] for row in rows[:5])
    assert all(row["tta/04_snow_5/loss"] for row in rows[5:])


def test_the_progress_line_has_the_running_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="segmill.tta.log"):
        module = adapt(tmp_path, [], every=100)
    *_, last = (record.getMessage() for record in caplog.records)
    score = 100 * module.record.scores()["mIoU"]
    assert last == f"source  04_snow_5  5/5  mIoU {score:.2f}  loss 0.0000"
    assert len(caplog.records) == 4


def test_the_last_line_is_of_all_processes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the scores are those of this process's share, which are not the table's."""
    monkeypatch.setattr(TaskRecord, "gather", lambda _: logging.getLogger(__name__).info("gather"))
    with caplog.at_level(logging.INFO):
        adapt(tmp_path, [], every=100, processes=2)
    lines = [record.getMessage().partition("  mIoU")[0] for record in caplog.records]
    assert [line for line in lines if "/5" in line or line == "gather"] == [
        "source  03_motion_blur_5  2/5",
        "gather",
        "source  03_motion_blur_5  5/5",
        "source  04_snow_5  2/5",
        "gather",
        "source  04_snow_5  5/5",
    ]


def test_the_end_of_a_method_is_its_mean_and_a_table_of_its_tasks(tmp_path: Path) -> None:
    logger = FakeWandb()
    module = adapt(tmp_path, [], every=100)
    tasks = tuple(
        module.record.result(task=task.name, corruption=task.corruption, severity=5)
        for task in TASKS
    )
    result = MethodResult(name="source", tasks=tasks, order="0" * 12)
    log_summary([logger], result, step=10)
    ((step, means),) = logger.logged
    assert step == 10
    assert means["tta/mIoU"] == result.score
    columns, rows = logger.tables["tta/tasks"]
    assert columns[:2] == ["task", "mIoU"]
    assert [row[:2] for row in rows] == [[task.name, tasks[0].score] for task in TASKS]
