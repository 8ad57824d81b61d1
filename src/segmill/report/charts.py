"""Curves and heat maps as pictures that follow the page's light or dark colours.

No text of the user is drawn here: names and titles are HTML around the picture, so that a Chinese
name needs no font on the machine that trains.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

LINES = 6  # colours --line-0 ... of the page, one a line
SHAPES = ("disc", "ring", "square")  # of dots, where there are more methods than colours
POINTS = 300  # a longer curve is shown as block means over a band from minimum to maximum
SCORES = {"mIoU", "mAcc", "aAcc", "FWIoU", "mDice", "mFscore", "mPrecision", "mRecall"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "segmill",
    "font.size": 9,
    "axes.edgecolor": "#0a0a01",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#0a0a02",
    "grid.linewidth": 0.6,
    "xtick.color": "#0a0a03",
    "ytick.color": "#0a0a03",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
PAGE_COLOURS = {"#0a0a01": "--rule", "#0a0a02": "--rule", "#0a0a03": "--muted"}
PAGE_COLOURS |= {f"#0b0b{line:02x}": f"--line-{line}" for line in range(LINES)}


class Curve(NamedTuple):
    """A logged value over optimizer steps."""

    steps: Float[np.ndarray, " N"]
    values: Float[np.ndarray, " N"]


class Chart(NamedTuple):
    """An inline SVG, what it shows, and the page's colour variable of each line."""

    title: str
    svg: str
    legend: list[tuple[str, str]]


class Dot(NamedTuple):
    """A value of a dot chart: its place in percent of the width, and what hovering says."""

    colour: str
    shape: str
    at: float
    hint: str


class DotChart(NamedTuple):
    """One row a task, one dot a method: drawn by the page itself, so that names may be any text."""

    title: str
    rows: list[tuple[str, list[Dot]]]
    ticks: list[tuple[float, str]]  # place, text
    legend: list[tuple[str, str, str]]  # colour, shape, name


def read_curves(path: Path) -> dict[str, Curve]:
    """Read a `metrics.csv`: a `step` column, and blanks where a value was not logged.

    Where a step occurs twice (after a resume), the later row counts.
    """
    values: dict[str, dict[float, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = float(row.pop("step"))
            for key, text in row.items():
                if text and key != "epoch":
                    values.setdefault(key, {})[step] = float(text)
    return {key: Curve(*np.array(sorted(by_step.items())).T) for key, by_step in values.items()}


def curve_charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """One chart a kind of value: scores, losses, learning rate, then the others by name.

    Scores of single classes (`val/IoU/road`) are in the table and not drawn.
    """
    kinds: dict[str, dict[str, Curve]] = {"Scores": {}, "Loss": {}, "Learning rate": {}}
    for key, curve in curves.items():
        if re.search(r"/(IoU|Acc|Dice)/", key) is None:
            kinds.setdefault(_kind(key), {})[key] = curve
    return [_chart(title, group) for title, group in kinds.items() if group]


def dot_chart(
    title: str,
    rows: Sequence[str],
    methods: Sequence[str],
    values: Float[np.ndarray, "R M"],
    *,
    reference: str,
) -> DotChart:
    """Fractions of every row under every method, in percent; `reference` is an upright stroke."""
    defined = values[~np.isnan(values)]
    low, high = (float(defined.min()), float(defined.max())) if len(defined) else (0.0, 1.0)
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(100 * low, 100 * high)
    first, span = ticks[0], ticks[-1] - ticks[0]
    others = [method for method in methods if method != reference]
    styles = {reference: ("--ink", "stroke")} | {
        method: (f"--line-{index % LINES}", SHAPES[index // LINES % len(SHAPES)])
        for index, method in enumerate(others)
    }
    dots = [
        [
            Dot(*styles[method], float((100 * value - first) / span * 100), f"{method} {value:.2%}")
            for method, value in zip(methods, row, strict=True)
            if not np.isnan(value)
        ]
        for row in values
    ]
    return DotChart(
        title,
        list(zip(rows, dots, strict=True)),
        [(float((tick - first) / span * 100), f"{tick:g}%") for tick in ticks],
        [(*styles[method], method) for method in methods],
    )


def heat_map(shares: Float[np.ndarray, "K J"], *, side: int) -> bytes:
    """PNG of a matrix of shares 0..1, about `side` pixels wide, darker blue for more."""
    scale = max(side // max(shares.shape), 1)
    strength = np.sqrt(np.nan_to_num(shares))[..., None]
    colours = np.array([250, 250, 252]) * (1 - strength) + np.array([20, 60, 160]) * strength
    large = np.kron(colours, np.ones((scale, scale, 1))).astype(np.uint8)
    return cv2.imencode(".png", np.ascontiguousarray(large[..., ::-1]))[1].tobytes()


def row_shares(confusion: Integer[np.ndarray, "K J"]) -> Float[np.ndarray, "K J"]:
    """Divide each row by its sum; a class without pixels is all NaN."""
    total = confusion.sum(axis=1, keepdims=True).astype(np.float64)
    return confusion / np.where(total > 0, total, np.nan)


def _kind(key: str) -> str:
    name = key.rsplit("/", 1)[-1]
    if name in SCORES:
        return "Scores"
    if "loss" in name:
        return "Loss"
    if name == "lr" or name.startswith(("lr-", "lr_", "learning_rate")):
        return "Learning rate"
    return name


def _chart(title: str, curves: Mapping[str, Curve]) -> Chart:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for line, curve in enumerate(curves.values()):
            _draw(axes, curve, f"#0b0b{line % LINES:02x}")
        axes.grid(visible=True, axis="y")
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if title == "Scores":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    legend = [(f"--line-{line % LINES}", key) for line, key in enumerate(curves)]
    return Chart(title, _for_page(buffer.getvalue()), legend)


def _draw(axes: Axes, curve: Curve, colour: str) -> None:
    count = len(curve.steps)
    if count <= POINTS:
        marker = "o" if count < 30 else None
        axes.plot(curve.steps, curve.values, color=colour, lw=1.6, marker=marker, ms=3.5)
        return
    starts = np.linspace(0, count, POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, count])
    low, high = (f.reduceat(curve.values, starts) for f in (np.minimum, np.maximum))
    steps = np.add.reduceat(curve.steps, starts) / sizes
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(steps, np.add.reduceat(curve.values, starts) / sizes, color=colour, lw=1.4)


def _for_page(svg: str) -> str:
    """Only the <svg> element, with the page's colours and font instead of fixed ones."""
    svg = svg[svg.index("<svg") :]
    for fixed, variable in PAGE_COLOURS.items():
        svg = svg.replace(fixed, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
