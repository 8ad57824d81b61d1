"""Scores per class, for the terminal and the report. Percent appears only in what is printed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.table import Table

from segmill.metrics import scores

HEADLINE = ("mIoU", "mAcc", "aAcc", "FWIoU")


class ClassScore(NamedTuple):
    """Fractions 0..1; NaN where a class does not occur. `share` is of the pixels that count."""

    name: str
    IoU: float
    Acc: float
    share: float


class Cell(NamedTuple):
    """A cell that is already text. `marks` are words of "best", "above" and "below"."""

    text: str
    marks: str = ""
    hint: str = ""


def class_scores(names: Sequence[str], confusion: Int[np.ndarray, "K J"]) -> list[ClassScore]:
    """One row a class, in class order; `confusion` as in metrics.py, (K, K) or (K, K + 1)."""
    found = scores(confusion)
    share = confusion.sum(axis=1) / max(int(confusion.sum()), 1)
    columns = (np.asarray(found["IoU"]), np.asarray(found["Acc"]), share)
    return [
        ClassScore(name, *(float(column[index]) for column in columns))
        for index, name in enumerate(names)
    ]


def headline(confusion: Int[np.ndarray, "K J"]) -> dict[str, float]:
    """The four scores of one line: mIoU, mAcc, aAcc, FWIoU."""
    found = scores(confusion)
    return {name: float(found[name]) for name in HEADLINE}


def score_table(names: Sequence[str], confusion: Int[np.ndarray, "K J"], *, title: str) -> Table:
    """The table `rich` prints: class, IoU, Acc and share of the pixels in percent."""
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for column in ("IoU %", "Acc %", "pixels %"):
        table.add_column(column, justify="right")
    for row in class_scores(names, confusion):
        table.add_row(row.name, percent(row.IoU), percent(row.Acc), percent(row.share))
    return table


def score_line(confusion: Int[np.ndarray, "K J"], *, protocol: str) -> str:
    """`mIoU 64.03  mAcc 72.41  aAcc 91.20  FWIoU 85.07  (percent; protocol whole)`."""
    parts = [f"{name} {percent(value)}" for name, value in headline(confusion).items()]
    return f"{'  '.join(parts)}  (percent; protocol {protocol})"


def percent(fraction: float) -> str:
    """Two decimals; a dash where there is nothing to score."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
