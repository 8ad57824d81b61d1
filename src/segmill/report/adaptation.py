"""The report of `segmill adapt`: the table of methods and corruptions, dots, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segmill.data.classes import Classes
from segmill.report.charts import DotChart, dot_chart
from segmill.report.comparison import caption, columns_of, lines_of, short_names
from segmill.report.examples import BeforeAfter
from segmill.report.html import TextTable, write_report
from segmill.report.tables import Cell
from segmill.tta.results import SOURCE, MethodResult

MARKS = (
    " Bold: the best of a column. Blue and orange: above and below the source, where the interval "
    "of the difference excludes zero; hover over a number to see it."
)


def write_adaptation_report(
    path: str | Path,
    *,
    title: str,
    command: str,
    classes: Classes,
    results: Sequence[MethodResult],
    facts: Mapping[str, str],
    examples: Sequence[BeforeAfter],
    seed: int,
) -> None:
    """Write the single-file report; `seed` is that of the resamples, as in the other tables."""
    write_report(
        path,
        title=title,
        command=command,
        classes=classes,
        results=[],
        facts=facts,
        curves={},
        examples=[],
        tables=[adaptation_table(results, seed=seed)],
        dots=_dots(results) if len(results) > 1 else None,
        changes=examples,
    )


def adaptation_table(results: Sequence[MethodResult], *, seed: int) -> TextTable:
    """Methods and corruptions, as a table of any report."""
    lines = lines_of(results, seed=seed)
    columns = columns_of(lines)
    rows = [
        [Cell(line.result.name), *(column.cells[index] for column in columns)]
        for index, line in enumerate(lines)
    ]
    marks = MARKS if any(line.comparison for line in lines) else ""
    header = ["method", *(column.header for column in columns)]
    return TextTable("Scores", header, rows, caption(lines) + marks)


def _dots(results: Sequence[MethodResult]) -> DotChart:
    values = np.array([[task.score for task in result.tasks] for result in results]).T
    means = np.array([[result.score for result in results]])
    return dot_chart(
        f"{results[0].counts.headline} by corruption",
        [*short_names(results[0].tasks), "mean"],
        [result.name for result in results],
        np.concatenate([values, means]),
        reference=SOURCE,
    )
