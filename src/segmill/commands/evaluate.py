"""`segmill eval`: score a run or a checkpoint under a named protocol and write the evidence."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Int64
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from segmill.checkpoint.load import load_weights
from segmill.commands.run_folder import environment, new_run_folder, write_provenance
from segmill.commands.trainer import build_trainer
from segmill.commands.trainer_settings import LoggingSettings, TrainerSettings
from segmill.configuration import Invocation, build
from segmill.data.datamodule import SegmentationData
from segmill.data.folder import FolderDataset
from segmill.errors import SegmillError
from segmill.evaluation import EvaluationModule
from segmill.files import write_whole
from segmill.metrics import SCALARS, scores
from segmill.models.discriminative import Discriminative
from segmill.protocol import Protocol
from segmill.report.charts import Curve, read_curves
from segmill.report.examples import Example
from segmill.report.html import Result, write_report
from segmill.report.tables import score_line, score_table
from segmill.segmenter import Segmenter, open_segmenter, plain

log = logging.getLogger(__name__)
EXAMPLES = 4  # best and worst images in the report, each


def run(config: DictConfig, context: Invocation) -> None:
    """Score `run=` (a run folder or model.safetensors), or `model=` with `weights=`."""
    config = _with_run(config, context)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    protocol: Protocol = build(config.protocol)
    data: SegmentationData = build(
        config.data, protocol=protocol, seed=config.seed, accumulate=1, start_step=0
    )
    split = config.split or data.val_split
    segmenter = _segmenter(config, data, protocol)
    data.dataset(split)  # a split that does not exist is refused before a folder is made
    folder = _result_folder(config, data, split, protocol)
    write_provenance(folder, config, context.command)
    settings: TrainerSettings = build(config.trainer)
    logging_settings = LoggingSettings.silent()
    trainer = build_trainer(settings, logging_settings, folder, extra_callbacks=[])
    scored = score(trainer, segmenter, data, split=split)
    if trainer.is_global_zero:
        report(scored, folder)
        source = config.run or f"{config.model_name} weights={config.weights}"
        log.info("Next: open %s, or segmill predict run=%s IMAGE", folder / "report.html", source)


@dataclass(frozen=True)
class Scored:
    """One evaluated split: who, on what, and the confusion matrix of all its images."""

    segmenter: Segmenter
    data: SegmentationData
    split: str
    confusion: Int64[np.ndarray, "K J"]
    per_image: list[tuple[int, float]]  # position in the split, mIoU
    seconds: float

    @property
    def dataset(self) -> FolderDataset:
        """The samples that were scored."""
        return self.data.dataset(self.split)

    @property
    def protocol(self) -> Protocol:
        """The protocol that they were scored under."""
        return self.segmenter.protocol


def score(
    trainer: lightning.Trainer, segmenter: Segmenter, data: SegmentationData, *, split: str
) -> Scored:
    """Score every image of `split` once, on all processes of `trainer`."""
    module = EvaluationModule(
        model=segmenter.model, protocol=segmenter.protocol, class_names=segmenter.classes.names
    )
    started = time.perf_counter()
    trainer.test(module, dataloaders=data.eval_loader(split), verbose=False)
    seconds = time.perf_counter() - started
    return Scored(segmenter, data, split, module.confusion, module.per_image, seconds)


def report(scored: Scored, folder: Path) -> None:
    """Print the table; write metrics.json, confusion.npy and report.html."""
    facts = _facts(scored)
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    write_whole(folder / "metrics.json", text.encode("utf-8"))
    np.save(folder / "confusion.npy", scored.confusion)
    name = scored.protocol.name
    title = f"{facts['data']} {scored.split}, {facts['images']} images, protocol {name}"
    console = Console()
    console.print(score_table(scored.segmenter.classes.names, scored.confusion, title=title))
    console.print(score_line(scored.confusion, protocol=name))
    write_report(
        folder / "report.html",
        title=folder.name,
        command=_read(folder / "command.txt"),
        classes=scored.segmenter.classes,
        results=[Result(run_of(folder), protocol_text(scored.protocol), scored.confusion)],
        facts=_report_facts(folder, facts),
        curves=curves_of(folder),
        examples=examples_of(scored),
        tables=[],
    )


def _facts(scored: Scored) -> dict[str, Any]:
    """Everything that says what the number is; goes into metrics.json."""
    result = scores(scored.confusion)
    return {
        "data": scored.data.name,
        "split": scored.split,
        "images": len(scored.dataset),
        "order": order_hash(scored.dataset),
        "protocol": scored.protocol.stamp(),
        "seconds_per_image": scored.seconds / max(len(scored.dataset), 1),
        "scores": {name: float(result[name]) for name in SCALARS},
        "IoU": _by_class(scored, result["IoU"]),
        "Acc": _by_class(scored, result["Acc"]),
        "environment": environment(),
    }


def order_hash(dataset: FolderDataset) -> str:
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
    pred = scored.segmenter.predict(sample.image).label
    return Example(sample.image, sample.label, pred, sample.name, miou)


def _segmenter(config: DictConfig, data: SegmentationData, protocol: Protocol) -> Segmenter:
    if config.run is not None:
        segmenter = replace(open_segmenter(config.run), protocol=protocol)
        _same_classes(segmenter, data)
    else:
        model: Discriminative = build(config.model)
        if config.weights is None:
            raise SegmillError(
                "Nothing to evaluate: give run=runs/NAME, or model=NAME weights=FILE."
            )
        load_weights(
            model.network,
            config.weights,
            may_miss=tuple(config.weights_may_miss),
            may_leave=tuple(config.weights_may_leave),
        )
        segmenter = Segmenter(
            model.eval(), data.classes, protocol, plain(config.model), data.depth_range
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return segmenter.to(device) if config.trainer.accelerator != "cpu" else segmenter


def _same_classes(segmenter: Segmenter, data: SegmentationData) -> None:
    if len(segmenter.classes) != len(data.classes):
        raise SegmillError(
            f"The model has {len(segmenter.classes)} classes, data={data.name} has "
            f"{len(data.classes)}: a score would compare different things. Choose the data set "
            f"that the model was trained for."
        )


def _with_run(config: DictConfig, context: Invocation) -> DictConfig:
    """Take the data of the run that is evaluated, unless data=... was given; values still win."""
    if config.run is None or any(item.startswith("data=") for item in context.overrides):
        return config
    path = Path(config.run)
    saved = (path if path.is_dir() else path.parent) / "config.yaml"
    if not saved.is_file():
        return config
    known = OmegaConf.load(saved)
    chosen = OmegaConf.create({"data": known.data})
    for override in context.overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("data."):
            OmegaConf.update(chosen, key, OmegaConf.select(config, key))
    merged = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    merged.data = chosen.data
    assert isinstance(merged, DictConfig)
    return merged


def _result_folder(
    config: DictConfig, data: SegmentationData, split: str, protocol: Protocol
) -> Path:
    """Beside the run that was scored; every evaluation has a folder of its own."""
    name = f"eval_{data.name}_{split}_{protocol.name}"
    if config.run is not None and Path(config.run).exists():
        path = Path(config.run)
        return new_run_folder(str(path if path.is_dir() else path.parent), name)
    return new_run_folder(config.output_dir, f"{config.model_name}_{name}")


def run_of(folder: Path) -> str:
    """The run that a result belongs to: an evaluation lies inside the folder of its run."""
    return folder.parent.name if folder.name.startswith("eval_") else folder.name


def protocol_text(protocol: Protocol) -> str:
    """The protocol in words that fit under a number."""
    stamp = protocol.stamp()
    return ", ".join(f"{key} {value}" for key, value in stamp.items() if value is not None)


def _report_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        "data": f"{facts['data']} {facts['split']}, {facts['images']} images, "
        f"order {facts['order']}",
        "seconds per image": f"{facts['seconds_per_image']:.3f}",
        "commit": _read(folder / "commit.txt"),
        "environment": "; ".join(facts["environment"]),
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _by_class(scored: Scored, values: Any) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(scored.segmenter.classes.names, values, strict=True)
    }
