"""The one table of a comparison of adaptation methods: for the terminal, as CSV, and as cells.

Percent in what is shown, fractions in the CSV file.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from segmill.bootstrap import LEVEL, RESAMPLES, Comparison, Interval, check_same_images, compare
from segmill.errors import SegmillError
from segmill.files import write_whole
from segmill.report.tables import Cell, percent
from segmill.tta.results import SOURCE, MethodResult, TaskResult

SHORT = {
    "gaussian_noise": "gauss.",
    "shot_noise": "shot",
    "impulse_noise": "impulse",
    "defocus_blur": "defocus",
    "glass_blur": "glass",
    "motion_blur": "motion",
    "zoom_blur": "zoom",
    "brightness": "bright.",
    "elastic_transform": "elastic",
    "pixelate": "pixel",
    "jpeg_compression": "jpeg",
    "speckle_noise": "speckle",
    "gaussian_blur": "g. blur",
}
DIFFERENCE = "diff."
# The scores of its kind of task stand in between.
CSV_BEFORE = ("method", "task", "corruption", "severity", "images")
CSV_AFTER = ("difference", "low", "high", "seconds_per_image", "peak_memory_bytes", "order")


class Line(NamedTuple):
    """One method, and how it compares with the source: None for the source, or without one."""

    result: MethodResult
    comparison: Comparison | None


class Column(NamedTuple):
    """One column of the table, a cell a method."""

    header: str
    cells: list[Cell]


def lines_of(results: Sequence[MethodResult], *, seed: int) -> list[Line]:
    """Every method with its differences to the one named `source`, if there is one."""
    if not results:
        raise SegmillError("There is no result to show: no method has run.")
    for other in results[1:]:
        check_same_images(other, results[0])
    source = next((result for result in results if result.name == SOURCE), None)
    if source is None:
        return [Line(result, None) for result in results]
    others = [result for result in results if result is not source]
    compared = iter(compare(others, source, seed=seed))
    return [Line(each, None if each is source else next(compared)) for each in results]


def columns_of(lines: Sequence[Line]) -> list[Column]:
    """Tasks, their mean, its difference to the source, further means, seconds, memory, if known."""
    tasks = lines[0].result.tasks
    columns = [
        Column(
            name,
            _scores(
                [line.result.tasks[index].score for line in lines],
                [line.comparison and line.comparison.tasks[index] for line in lines],
            ),
        )
        for index, name in enumerate(short_names(tasks))
    ]
    overall = [line.comparison and line.comparison.mean for line in lines]
    columns.append(Column("mean", _scores([line.result.score for line in lines], overall)))
    if any(overall):
        columns.append(Column(DIFFERENCE, [_difference(each) for each in overall]))
        columns.append(Column("low", [Cell(signed(each.low) if each else "") for each in overall]))
        columns.append(
            Column("high", [Cell(signed(each.high) if each else "") for each in overall])
        )
    columns += [
        Column(name, [Cell(percent(line.result.scores[name])) for line in lines])
        for name in lines[0].result.counts.beside
    ]
    columns.append(Column("s/image", [Cell(_seconds(line.result.seconds)) for line in lines]))
    if any(line.result.peak_memory for line in lines):
        columns.append(Column("GiB", [Cell(_gib(line.result.peak_memory)) for line in lines]))
    return columns


def short_names(tasks: Sequence[TaskResult]) -> list[str]:
    """Headers of a few letters; the severity only where it differs."""
    names = [SHORT.get(task.corruption, task.corruption.replace("_", " ")) for task in tasks]
    if len({task.severity for task in tasks}) == 1:
        return names
    return [f"{name} {task.severity}" for name, task in zip(names, tasks, strict=True)]


def caption(lines: Sequence[Line]) -> str:
    """What the numbers are, on which images."""
    result = lines[0].result
    severities = {task.severity for task in result.tasks} - {0}
    severity = f", severity {severities.pop()}" if len(severities) == 1 else ""
    counts = [len(task.names) for task in result.tasks]
    images = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    headline = result.counts.headline
    said = [f"{headline} in percent; {images} images a task{severity}; order {result.order}."]
    if result.counts.beside:
        said.append(f"{' and '.join(result.counts.beside)}: means over the tasks, in percent.")
    if any(line.comparison for line in lines):
        said.append(
            f"{DIFFERENCE}: mean minus {SOURCE}, from low to high in {100 * LEVEL:.0f} % of "
            f"{RESAMPLES} paired resamples of the images."
        )
    if any(line.result.peak_memory for line in lines):
        said.append("GiB: peak memory of one GPU.")
    return " ".join(said)


def print_table(
    results: Sequence[MethodResult], *, seed: int, console: Console | None = None
) -> None:
    """Rows are methods; where that is too wide, columns are, in as many tables as it takes."""
    console = console or Console()
    lines = lines_of(results, seed=seed)
    columns = columns_of(lines)
    names = [line.result.name for line in lines]
    table = _rich("method", [column.header for column in columns])
    for index, name in enumerate(names):
        table.add_row(Text(name), *(_text(column, index) for column in columns))
    if _fits(table, console):
        console.print(table)
    else:
        _print_transposed(names, columns, console)
    star = " *: zero is not in between." if any(line.comparison for line in lines) else ""
    console.print(caption(lines) + star, markup=False, highlight=False)


def write_csv(path: str | Path, results: Sequence[MethodResult], *, seed: int) -> None:
    """One row for every method and task, and one with the task `mean`; empty is undefined."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    lines = lines_of(results, seed=seed)
    writer.writerow([*CSV_BEFORE, *results[0].counts.shown, *CSV_AFTER])
    for result, comparison in lines:
        intervals = comparison.tasks if comparison else (None,) * len(result.tasks)
        for task, interval in zip(result.tasks, intervals, strict=True):
            what = (task.task, task.corruption, task.severity, len(task.names))
            cost = (task.seconds, task.peak_memory or None)
            writer.writerow(_csv_row(result, what, task.scores, interval, cost))
        what = ("mean", None, None, result.images)
        cost = (result.seconds, result.peak_memory or None)
        mean = comparison and comparison.mean
        writer.writerow(_csv_row(result, what, result.scores, mean, cost))
    write_whole(Path(path), buffer.getvalue().encode("utf-8"))


def signed(fraction: float) -> str:
    """A difference in percent points, with its sign."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:+.2f}"


def _scores(values: Sequence[float], differences: Sequence[Interval | None]) -> list[Cell]:
    """The best is marked, and what differs from the source for sure."""
    best = max((value for value in values if not math.isnan(value)), default=math.nan)
    cells = []
    for value, difference in zip(values, differences, strict=True):
        marks = [_side(difference)] if difference else []
        marks += ["best"] if len(values) > 1 and value == best else []
        hint = _in_words(difference) if difference else ""
        cells.append(Cell(percent(value), " ".join(filter(None, marks)), hint))
    return cells


def _difference(interval: Interval | None) -> Cell:
    if interval is None:
        return Cell("")
    return Cell(signed(interval.difference), _side(interval), _in_words(interval))


def _side(interval: Interval) -> str:
    if not interval.excludes_zero:
        return ""
    return "above" if interval.low > 0 else "below"


def _in_words(interval: Interval) -> str:
    low, high = signed(interval.low), signed(interval.high)
    return f"{signed(interval.difference)} to {SOURCE}, {100 * LEVEL:.0f} % from {low} to {high}"


def _seconds(seconds: float) -> str:
    digits = next((digits for digits, top in ((5, 0.01), (3, 1), (2, 10)) if seconds < top), 1)
    return f"{seconds:.{digits}f}"


def _gib(memory: int) -> str:
    return f"{memory / 2**30:.1f}" if memory else "-"


def _rich(first: str, headers: Sequence[str]) -> Table:
    table = Table(padding=(0, 1), pad_edge=False, box=None, header_style="bold")
    table.add_column(first, no_wrap=True)
    for header in headers:
        table.add_column(Text(header), justify="right", no_wrap=True)
    return table


def _text(column: Column, index: int) -> Text:
    text, marks, _ = column.cells[index]
    # Only differences have a star: for the tasks it would be in nearly every cell.
    star = "*" if column.header == DIFFERENCE and marks else ""
    return Text(f"{star}{text}", style="bold green" if "best" in marks.split() else "")


def _fits(table: Table, console: Console) -> bool:
    unlimited = console.options.update(max_width=100_000)
    return Measurement.get(console, unlimited, table).maximum <= console.width


def _transposed(names: Sequence[str], columns: Sequence[Column], chosen: range) -> Table:
    table = _rich("", [names[index] for index in chosen])
    for column in columns:
        table.add_row(
            Text(column.header, style="bold" if column.header == "mean" else ""),
            *(_text(column, index) for index in chosen),
        )
    return table


def _print_transposed(names: Sequence[str], columns: Sequence[Column], console: Console) -> None:
    start = 0
    while start < len(names):
        stop = len(names)
        while stop > start + 1 and not _fits(
            _transposed(names, columns, range(start, stop)), console
        ):
            stop -= 1
        console.print(_transposed(names, columns, range(start, stop)))
        console.print()
        start = stop


def _csv_row(
    result: MethodResult,
    what: tuple[str, str | None, int | None, int],
    scores: dict[str, float],
    interval: Interval | None,
    cost: tuple[float, int | None],
) -> list[str | int | float | None]:
    numbers = [scores[name] for name in result.counts.shown]
    differences = interval or (None, None, None)
    row = [result.name, *what, *numbers, *differences, *cost, result.order]
    return [None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row]
