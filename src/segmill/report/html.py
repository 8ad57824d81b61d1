"""One HTML file that says what was run, how well it did, and on which images it fails.

Everything is inside the file: it opens from a cluster by copying it, in light and dark mode.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import jinja2
import numpy as np
from jaxtyping import Int, Int64, Integer, UInt8

from segmill.data.classes import Classes
from segmill.data.sample import IGNORE
from segmill.files import write_whole
from segmill.metrics import AbsentClass, confusion_with_misses
from segmill.report.charts import Curve, DotChart, curve_charts, heat_map, row_shares
from segmill.report.examples import BeforeAfter, Example
from segmill.report.overlay import colourise, error_map
from segmill.report.tables import (
    HEADLINE,
    Cell,
    ClassScore,
    absent_note,
    class_scores,
    headline,
    percent,
)
from segmill.tta.results import SOURCE

WIDTH = 480  # pixels of a picture in the report; larger images are reduced
STRIP = 240  # of a picture in a strip
LARGEST_TABLE = 32  # classes; a larger confusion matrix is drawn as a picture
CONFUSIONS = 8
ENLARGE = "mIoU of one image: mean over the classes in it. Click a picture to enlarge its row."
ERRORS_NOTE = f"Errors are red; hatched pixels do not count. {ENLARGE}"
STRIP_NOTE = "First the class of the image, then what each method takes it for."
CHANGES_NOTE = f"Hatched pixels do not count. {ENLARGE}"


@dataclass(frozen=True)
class Result:
    """One evaluated model: its name in tables, the protocol in words, and its confusion matrix."""

    name: str
    protocol: str
    confusion: Int64[np.ndarray, "K J"]
    absent_class: AbsentClass = "drop"

    @property
    def note(self) -> str:
        """What the means would be under the other rule for absent classes, or nothing."""
        return absent_note(self.confusion, absent_class=self.absent_class)


@dataclass(frozen=True)
class TextTable:
    """Any further table. Marked cells: `best` is bold, `above` blue and `below` orange."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str


def write_report(
    path: str | Path,
    *,
    title: str,
    command: str,
    classes: Classes,
    results: Sequence[Result],
    facts: Mapping[str, str],
    curves: Mapping[str, Curve],
    examples: Sequence[Example],
    tables: Sequence[TextTable],
    dots: DotChart | None = None,
    changes: Sequence[BeforeAfter] = (),
) -> None:
    """Write the report of a run (one result) or of a comparison (several).

    `facts` are shown as they are: seed, commit, environment, checkpoint. `examples` are sorted by
    mIoU and shown as best and worst, `changes` as they come; `curves` come from `read_curves`. Any
    part may be empty.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("segmill.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "colour": _css_colour}
    page = environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        classes=classes,
        headline_names=HEADLINE,
        results=[
            (result, headline(result.confusion, absent_class=result.absent_class))
            for result in results
        ],
        per_class=_per_class(classes, results),
        facts=facts,
        charts=curve_charts(curves),
        confusions=[_confusion(result, classes.names) for result in results],
        dots=dots,
        galleries=[*_galleries(examples, classes), *_changes(changes, classes)],
        tables=[(table, [_cells(row) for row in table.rows]) for table in tables],
    )
    write_whole(Path(path), page.encode("utf-8"))


class _Row(NamedTuple):
    """One class with its score under each result."""

    name: str
    share: float
    scores: list[ClassScore]


class _Confusion(NamedTuple):
    result: Result
    columns: list[str]
    shares: list[list[float]] | None  # None: too many classes, see `picture`
    picture: str
    most: list[tuple[str, str, float, int]]  # label, prediction, share of the label, pixels


class _Shot(NamedTuple):
    name: str
    remark: str
    pictures: list[tuple[str, str]]  # caption, data address


class _Gallery(NamedTuple):
    heading: str
    shots: list[_Shot]
    note: str


def _per_class(classes: Classes, results: Sequence[Result]) -> list[_Row]:
    columns = [class_scores(classes.names, result.confusion) for result in results]
    return [
        _Row(of_class[0].name, of_class[0].share, list(of_class))
        for of_class in zip(*columns, strict=True)
    ]


def _confusion(result: Result, names: Sequence[str]) -> _Confusion:
    shares = row_shares(result.confusion)
    columns = [*names, "(none)"][: shares.shape[1]]
    small = len(names) <= LARGEST_TABLE
    return _Confusion(
        result,
        columns,
        shares.tolist() if small else None,
        "" if small else _address("image/png", heat_map(shares, side=720)),
        _most_confused(result.confusion, names, columns),
    )


def _most_confused(
    confusion: Int[np.ndarray, "K J"], names: Sequence[str], columns: Sequence[str]
) -> list[tuple[str, str, float, int]]:
    """The errors that cost most pixels, largest first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    shares = row_shares(confusion)
    pairs = [divmod(int(position), wrong.shape[1]) for position in order]
    return [
        (names[label], columns[pred], float(shares[label, pred]), int(wrong[label, pred]))
        for label, pred in pairs
        if wrong[label, pred] > 0
    ]


def _cells(row: Sequence[str | Cell]) -> list[Cell]:
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]


def _galleries(examples: Sequence[Example], classes: Classes) -> list[_Gallery]:
    ordered = sorted(examples, key=lambda example: -example.miou)
    shots = [_shot(example, classes.palette) for example in ordered]
    half = (len(shots) + 1) // 2
    parts = {"Best images": shots[:half], "Worst images": shots[half:][::-1]}
    galleries = [_Gallery(heading, part, "") for heading, part in parts.items() if part]
    return [*galleries[:-1], *(last._replace(note=ERRORS_NOTE) for last in galleries[-1:])]


def _changes(changes: Sequence[BeforeAfter], classes: Classes) -> list[_Gallery]:
    strip = [change for change in changes if change.is_of_classes]
    shots = [_change(change, classes) for change in changes if not change.is_of_classes]
    galleries = [_Gallery("Before and after", shots, CHANGES_NOTE)] if shots else []
    return galleries + ([_strip(strip, classes)] if strip else [])


def _strip(changes: Sequence[BeforeAfter], classes: Classes) -> _Gallery:
    """Images side by side, each with its class and what the methods take it for."""
    pictures = []
    for change in changes:
        said = [f"truth: {_class_name(change.label, classes)}"]
        for name, pred in change.preds.items():
            right = "✓" if (pred == change.label).all() else "✗"
            when = "before" if name == SOURCE else "after"
            said.append(f"{when}: {name} {right} {_class_name(pred, classes)}")
        height, width = change.image.shape[:2]
        size = min(width, STRIP), round(height * min(width, STRIP) / width)
        image = cv2.resize(change.image, size, interpolation=cv2.INTER_AREA)
        pictures.append((" · ".join(said), _jpeg(image[..., :3])))
    corruptions = dict.fromkeys(change.corruption.replace("_", " ") for change in changes)
    shot = _Shot(f"{len(changes)} images", ", ".join(corruptions), pictures)
    return _Gallery("Before and after", [shot], STRIP_NOTE)


def _class_name(pixel: Integer[np.ndarray, "1 1"], classes: Classes) -> str:
    """In words: ImageNet's names are numbers of WordNet."""
    index = int(pixel[0, 0])
    return classes.prompts[index] if index < len(classes) else "(none)"


def _shot(example: Example, palette: UInt8[np.ndarray, "K 3"]) -> _Shot:
    size = _shown_size(example.label)
    image = cv2.resize(example.image, size, interpolation=cv2.INTER_AREA)
    label, pred = (_reduce(array, size) for array in (example.label, example.pred))
    errors = error_map(image, label, pred, ignore_index=IGNORE)
    pictures = [*_inputs(image, "image"), ("truth", _png(colourise(label, palette)))]
    for name, other in example.others.items():
        pictures.append((name, _png(colourise(_reduce(other, size), palette))))
    pictures += [("prediction", _png(colourise(pred, palette))), ("errors", _jpeg(errors))]
    return _Shot(example.name, f"mIoU {percent(example.miou)} %", pictures)


def _change(change: BeforeAfter, classes: Classes) -> _Shot:
    size = _shown_size(change.label)
    image = cv2.resize(change.image, size, interpolation=cv2.INTER_AREA)
    corruption = change.corruption.replace("_", " ")
    severity = f", severity {change.severity}" if change.severity else ""
    truth = _png(colourise(_reduce(change.label, size), classes.palette))
    pictures = [*_inputs(image, corruption), ("truth", truth)]
    for name, pred in change.preds.items():
        confusion = confusion_with_misses(change.label, pred, len(classes))
        when = "before" if name == SOURCE else "after"
        caption = f"{when}: {name}, mIoU {percent(headline(confusion)['mIoU'])} %"
        pictures.append((caption, _png(colourise(_reduce(pred, size), classes.palette))))
    return _Shot(change.name, f"{corruption}{severity}", pictures)


def _shown_size(label: Integer[np.ndarray, "H W"]) -> tuple[int, int]:
    height, width = label.shape
    return min(width, WIDTH), round(height * min(width, WIDTH) / width)


def _inputs(image: UInt8[np.ndarray, "H W C"], caption: str) -> list[tuple[str, str]]:
    pictures = [(caption, _jpeg(image[..., :3]))]
    if image.shape[2] == 4:
        pictures.append(("depth", _jpeg(image[..., 3:].repeat(3, axis=2))))
    return pictures


def _reduce(array: Integer[np.ndarray, "H W"], size: tuple[int, int]) -> Integer[np.ndarray, "h w"]:
    return cv2.resize(array, size, interpolation=cv2.INTER_NEAREST_EXACT)


def _jpeg(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    bgr = np.ascontiguousarray(picture[..., ::-1])
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return _address("image/jpeg", encoded.tobytes())


def _png(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    bgr = np.ascontiguousarray(picture[..., ::-1])
    return _address("image/png", cv2.imencode(".png", bgr)[1].tobytes())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _css_colour(colour: UInt8[np.ndarray, " 3"]) -> str:
    red, green, blue = (int(part) for part in colour)
    return f"rgb({red} {green} {blue})"
