"""Scores per class, for the terminal and the report. Percent appears only in what is printed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.table import Table

from segmill.metrics import AbsentClass, scores

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


def headline(
    confusion: Int[np.ndarray, "K J"], *, absent_class: AbsentClass = "drop"
) -> dict[str, float]:
    """The four scores of one line: mIoU, mAcc, aAcc, FWIoU."""
    found = scores(confusion, absent_class=absent_class)
    return {name: float(found[name]) for name in HEADLINE}


def score_table(
    names: Sequence[str],
    confusion: Int[np.ndarray, "K J"],
    *,
    title: str,
    absent_class: AbsentClass = "drop",
) -> Table:
    """The table `rich` prints: class, IoU, Acc and share of the pixels in percent."""
    note = absent_note(confusion, absent_class=absent_class) or None
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    table.add_column("class")
    for column in ("IoU %", "Acc %", "pixels %"):
        table.add_column(column, justify="right")
    for row in class_scores(names, confusion):
        table.add_row(row.name, percent(row.IoU), percent(row.Acc), percent(row.share))
    return table


def score_line(
    confusion: Int[np.ndarray, "K J"], *, protocol: str, absent_class: AbsentClass = "drop"
) -> str:
    """`mIoU 64.03  mAcc 72.41  aAcc 91.20  FWIoU 85.07  (percent; protocol whole)`.

    Where the means depend on `absent_class`, it goes on with `absent_note`.
    """
    values = headline(confusion, absent_class=absent_class)
    parts = [f"{name} {percent(value)}" for name, value in values.items()]
    notes = ["percent", f"protocol {protocol}", absent_note(confusion, absent_class=absent_class)]
    return f"{'  '.join(parts)}  ({'; '.join(filter(None, notes))})"


def classification_line(values: Mapping[str, float]) -> str:
    """`top1 97.00  top5 100.00  ece 1.53  (percent)`."""
    parts = [f"{name} {percent(values[name])}" for name in ("top1", "top5", "ece")]
    return f"{'  '.join(parts)}  (percent)"


def absent_note(confusion: Int[np.ndarray, "K J"], *, absent_class: AbsentClass) -> str:
    """What the means do with absent classes, and what they were otherwise; "" if it is the same.

    `means leave out absent classes; counting them as 0: mIoU 41.67, mAcc 58.33`
    """
    other: AbsentClass = "zero" if absent_class == "drop" else "drop"
    ours = headline(confusion, absent_class=absent_class)
    theirs = headline(confusion, absent_class=other)
    changed = [
        f"{name} {percent(theirs[name])}" for name in HEADLINE if _differ(name, ours, theirs)
    ]
    if not changed:
        return ""
    words = {
        "drop": "means leave out absent classes; counting them as 0",
        "zero": "means count absent classes as 0; leaving them out",
    }
    return f"{words[absent_class]}: {', '.join(changed)}"


def _differ(name: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    return percent(ours[name]) != percent(theirs[name])


def percent(fraction: float) -> str:
    """Two decimals; a dash where there is nothing to score."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
