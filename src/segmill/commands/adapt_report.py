"""What `segmill adapt` leaves at the end: the table, results.csv, results.json and report.html."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from segmill.commands.adapt_parts import AdaptParts
from segmill.commands.adapt_pictures import Pictures
from segmill.commands.adapt_rows import Row
from segmill.commands.run_folder import environment
from segmill.commands.settings import TTASettings
from segmill.data.task_data import TaskData
from segmill.report.adaptation import write_adaptation_report
from segmill.report.comparison import print_table, write_csv
from segmill.report.examples import BeforeAfter
from segmill.tta.results import SOURCE, MethodResult, write_json

log = logging.getLogger(__name__)


def write_results(
    folder: Path,
    results: Sequence[MethodResult],
    parts: AdaptParts,
    rows: Mapping[str, Row],
    pictures: Pictures,
    config: DictConfig,
) -> None:
    """Print the table of methods and corruptions; write it as CSV, JSON and HTML."""
    print_table(results, seed=config.seed)
    write_csv(folder / "results.csv", results, seed=config.seed)
    write_json(folder / "results.json", results)
    write_adaptation_report(
        folder / "report.html",
        title=folder.name,
        command=_read(folder / "command.txt"),
        classes=parts.data.classes,
        results=results,
        facts=_facts(folder, parts, rows, config),
        examples=_before_and_after(results, pictures, parts),
        seed=config.seed,
    )


def _facts(
    folder: Path, parts: AdaptParts, rows: Mapping[str, Row], config: DictConfig
) -> dict[str, str]:
    """Everything that says what the numbers are."""
    scored = "top-1, top-5, expected calibration error of 15 bins of equal width"
    if isinstance(parts.data, TaskData):
        scored = json.dumps(parts.protocol.stamp())
    model = config.run or f"{config.model_name} weights={config.weights}"
    return {
        "model": f"{model}; {parts.summary().splitlines()[0]}",
        "data": f"{parts.data.name}, {parts.amount}, order {parts.data.order_hash()}",
        "setting": f"{_settings(rows)}; seed {config.seed}",
        "batch": parts.batch,
        "protocol": scored,
        "commit": _read(folder / "commit.txt"),
        "environment": "; ".join(environment()),
    }


def _settings(rows: Mapping[str, Row]) -> str:
    """What the harness does between and after updates; of the rows, where they differ."""
    adapting = [name for name in rows if name != SOURCE] or [SOURCE]
    named: dict[str, list[str]] = {}
    for name in adapting:
        named.setdefault(_setting(rows[name].tta), []).append(name)
    if len(named) == 1:
        return next(iter(named))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in named.items())


def _setting(tta: TTASettings) -> str:
    order = "mixed" if tta.mixed else "continual" if tta.continual else "reset for every task"
    epochs = "" if tta.max_epochs == 1 else f", in the last of {tta.max_epochs} epochs"
    return f"{order}; predictions from {tta.predict} the update{epochs}"


def _before_and_after(
    results: Sequence[MethodResult], pictures: Pictures, parts: AdaptParts
) -> list[BeforeAfter]:
    """The kept images, each with what every method said of it."""
    tasks = {task.name: task for task in parts.data.tasks}
    names = {task.task: task.names for task in results[0].tasks}
    return [
        BeforeAfter(
            image=pictures.image(task, index),
            label=pictures.label(task, index),
            name=names[task][index],
            corruption=tasks[task].corruption if task in tasks else "mixed",
            severity=tasks[task].severity if task in tasks else 0,
            preds={each.name: pictures.pred(each.name, task, index) for each in results},
        )
        for task, index in pictures.wanted
        if task in names
    ]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()
