"""What a scored split leaves behind: the printed table, metrics.json, confusion.npy, report.html.

Needs no framework, so that every runtime reports alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from omegaconf import DictConfig
from rich.console import Console

from segmill.commands.run_folder import environment, new_run_folder
from segmill.data.classes import Classes, HasClasses
from segmill.data.folder import FolderDataset
from segmill.data.labelled_image import LabelMaps
from segmill.files import write_whole
from segmill.metrics import SCALARS, AbsentClass, scores
from segmill.protocol import Protocol
from segmill.report.charts import Curve, read_curves
from segmill.report.examples import Example
from segmill.report.html import Result, write_report
from segmill.report.tables import classification_line, score_line, score_table
from segmill.tta.counts import ImageCounts

EXAMPLES = 4  # best and worst images in the report, each


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One evaluated split: on what, how, and the confusion matrix of all its images."""

    data_name: str
    split: str
    dataset: FolderDataset | LabelMaps  # the samples that were scored
    classes: Classes
    protocol: Protocol
    confusion: Int64[np.ndarray, "K J"]
    per_image: list[tuple[int, float]]  # position in the split, mIoU
    seconds: float
    predict: Callable[[UInt8[np.ndarray, "H W C"]], UInt8[np.ndarray, "H W"]]  # under `protocol`
    image_counts: ImageCounts | None = None  # of images with one label


def report(scored: Scored, folder: Path) -> None:
    """Print the table; write metrics.json, confusion.npy and report.html."""
    facts = _facts(scored)
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    write_whole(folder / "metrics.json", text.encode("utf-8"))
    np.save(folder / "confusion.npy", scored.confusion)
    name = scored.protocol.name
    title = f"{facts['data']} {scored.split}, {facts['images']} images, protocol {name}"
    console = Console()
    absent = scored.protocol.absent_class
    names = scored.classes.names
    console.print(score_table(names, scored.confusion, title=title, absent_class=absent))
    console.print(score_line(scored.confusion, protocol=name, absent_class=absent))
    if scored.image_counts is not None:
        console.print(classification_line(scored.image_counts.scores()))
    write_report(
        folder / "report.html",
        title=folder.name,
        command=_read(folder / "command.txt"),
        classes=scored.classes,
        results=[_result(scored, run_of(folder))],
        facts=_report_facts(folder, facts),
        curves=curves_of(folder),
        examples=examples_of(scored),
        tables=[],
    )


def _result(scored: Scored, name: str) -> Result:
    protocol = scored.protocol
    return Result(name, protocol_text(protocol), scored.confusion, protocol.absent_class)


def _facts(scored: Scored) -> dict[str, Any]:
    """Everything that says what the number is; goes into metrics.json."""
    result = scores(scored.confusion, absent_class=scored.protocol.absent_class)
    return {
        "data": scored.data_name,
        "split": scored.split,
        "images": len(scored.dataset),
        "order": order_hash(scored.dataset),
        "protocol": scored.protocol.stamp(),
        "seconds_per_image": scored.seconds / max(len(scored.dataset), 1),
        "scores": {name: float(result[name]) for name in SCALARS} | _of_images(scored),
        "absent_classes": {how: _means(scored.confusion, how) for how in ("drop", "zero")},
        "IoU": _by_class(scored, result["IoU"]),
        "Acc": _by_class(scored, result["Acc"]),
        "environment": environment(),
    }


def _of_images(scored: Scored) -> dict[str, float]:
    """top1, top5 and ece of images with one label."""
    return {} if scored.image_counts is None else scored.image_counts.scores()


def _means(confusion: Int64[np.ndarray, "K J"], absent_class: AbsentClass) -> dict[str, float]:
    result = scores(confusion, absent_class=absent_class)
    return {name: float(result[name]) for name in ("mIoU", "mAcc", "mFscore")}


def order_hash(dataset: FolderDataset | LabelMaps) -> str:
    """Twelve digits that change when the list of images or its order does."""
    return sha256(b"\n".join(bytes(name) for name in dataset.names)).hexdigest()[:12]


def curves_of(folder: Path) -> dict[str, Curve]:
    """What was logged, over all parts of a run that was resumed."""
    parts = [read_curves(path) for path in sorted(folder.glob("metrics*.csv"))]
    names = {name for part in parts for name in part}
    return {
        name: Curve(*_in_order([part[name] for part in parts if name in part]))
        for name in sorted(names)
    }


def _in_order(parts: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.concatenate([part.steps for part in parts])
    values = np.concatenate([part.values for part in parts])
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def examples_of(scored: Scored, like: Scored | None = None) -> list[Example]:
    """The best and worst images, predicted once more for their pictures.

    With `like`, the images that are best and worst there, in the same order.
    """
    ranked = sorted((like or scored).per_image, key=lambda item: (-item[1], item[0]))
    ranked = [item for item in ranked if not np.isnan(item[1])]
    chosen = ranked if len(ranked) <= 2 * EXAMPLES else ranked[:EXAMPLES] + ranked[-EXAMPLES:]
    own = dict(scored.per_image)
    return [_example(scored, index, own[index]) for index, _ in chosen]


def _example(scored: Scored, index: int, miou: float) -> Example:
    sample = scored.dataset[index]
    assert sample.label is not None
    pred = scored.predict(sample.image)
    return Example(sample.image, sample.label, pred, sample.name, miou)


def run_of(folder: Path) -> str:
    """The run that a result belongs to: an evaluation lies inside the folder of its run."""
    return folder.parent.name if folder.name.startswith("eval_") else folder.name


def protocol_text(protocol: Protocol) -> str:
    """The protocol in words that fit under a number."""
    stamp = protocol.stamp()
    return ", ".join(f"{key} {value}" for key, value in stamp.items() if value is not None)


def _report_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    one_label = "top1" in facts["scores"]
    return {
        "data": f"{facts['data']} {facts['split']}, {facts['images']} images, "
        f"order {facts['order']}",
        **({"classification": classification_line(facts["scores"])} if one_label else {}),
        "seconds per image": f"{facts['seconds_per_image']:.3f}",
        "commit": _read(folder / "commit.txt"),
        "environment": "; ".join(facts["environment"]),
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _by_class(scored: Scored, values: Any) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(scored.classes.names, values, strict=True)
    }


def result_folder(config: DictConfig, data: HasClasses, split: str, protocol: Protocol) -> Path:
    """Beside the run that was scored; every evaluation has a folder of its own."""
    name = f"eval_{data.name}_{split}_{protocol.name}"
    if config.run is not None and Path(config.run).exists():
        path = Path(config.run)
        return new_run_folder(str(path if path.is_dir() else path.parent), name)
    return new_run_folder(config.output_dir, f"{config.model_name}_{name}")
