"""`segmill demo`: the whole path on generated rooms, without a network or a data set.

Trains a small RGB and a small RGB-D model and scores both on rooms that neither has seen; trains a
small guide, corrupts the unseen rooms, and lets the RGB model adapt to them by four methods and the
RGB-D model, whose depth is not corrupted, by Tent.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import lightning
import torch
from omegaconf import DictConfig

from segmill.commands.adapt import compare
from segmill.commands.evaluate import score
from segmill.commands.reporting import Scored, curves_of, examples_of, protocol_text
from segmill.commands.run_folder import environment, new_run_folder, write_provenance
from segmill.commands.train import Parts, build_parts, fit
from segmill.configuration import Invocation, compose
from segmill.report.adaptation import adaptation_table
from segmill.report.examples import Example
from segmill.report.html import Result, TextTable, write_report
from segmill.report.tables import headline, percent, score_line
from segmill.tta.results import SOURCE, MethodResult

log = logging.getLogger(__name__)
MODELS = {"RGB": "demo_rgb", "RGB-D": "demo_rgbd"}
RUNS = {"RGB": "rgb", "RGB-D": "rgbd"}
GUIDE = "demo_guide"
ADAPTATIONS = {"RGB": "demo_adapt", "RGB-D": "demo_adapt_rgbd"}
COMPARED = (SOURCE, "tent")  # what both models are adapted by


def run(config: DictConfig, context: Invocation) -> None:
    """Generate, train, evaluate, report."""
    started = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = new_run_folder(config.output_dir, config.name)
    write_provenance(folder, config, context.command)
    scored = {name: _train(name, folder, config) for name in MODELS}
    _train_guide(folder, config)
    adapted = {name: _adapt(name, folder, config) for name in ADAPTATIONS}
    protection = depth_table(
        {name: headline(each.confusion)["mIoU"] for name, each in scored.items()},
        {name: {each.name: each.score for each in results} for name, results in adapted.items()},
    )
    _report(folder, scored, adapted["RGB"], protection, config)
    log.info("\nForty rooms that neither model has seen:")
    for name, each in scored.items():
        log.info("  %-6s %s", name, score_line(each.confusion, protocol=each.protocol.name))
    log.info("\nThe RGB model on the same rooms, corrupted (mIoU, mean over the corruptions):")
    for result in adapted["RGB"]:
        log.info("  %-7s %.2f", result.name, 100 * result.score)
    log.info("\n%s", protection.title)
    for cells in (protection.header, *protection.rows):
        log.info("  %-6s %14s %18s %16s", *cells)
    log.info("Took %.0f seconds.", time.perf_counter() - started)
    log.info("Look at:  %s", folder / "report.html")
    log.info("Next:     segmill predict run=%s %s", folder / "rgb", folder / "scenes/images/test")


def _train(name: str, folder: Path, config: DictConfig) -> Scored:
    steps = {"max_steps": config.steps, "val_every": max(config.steps // 3, 1)}
    parts, trainer = _fit(name, MODELS[name], folder, config, steps)
    return score(trainer, parts.segmenter, parts.data, split="test")


def _train_guide(folder: Path, config: DictConfig) -> None:
    """A small SiT; its scores are those of a classifier by errors of prediction."""
    steps = {"max_steps": config.guide_steps, "val_every": config.guide_steps}
    _fit("Guide", GUIDE, folder, config, steps)


def _fit(
    name: str, experiment: str, folder: Path, config: DictConfig, steps: dict[str, int]
) -> tuple[Parts, lightning.Trainer]:
    overrides = [
        f"experiment={experiment}",
        f"data.data_root={folder / 'scenes'}",
        f"output_dir={folder}",
        f"seed={config.seed}",
        *(f"trainer.{key}={value}" for key, value in steps.items()),
    ]
    log.info("\n%s: segmill train %s", name, " ".join(overrides))
    run_config = compose("train", overrides)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    run_folder = new_run_folder(str(folder), run_config.experiment.name)
    write_provenance(run_folder, run_config, "segmill train " + " ".join(overrides))
    parts = build_parts(run_config, evidence=run_folder / "evidence", start_step=0)
    return parts, fit(parts, run_config, run_folder, None)


def _adapt(name: str, folder: Path, config: DictConfig) -> list[MethodResult]:
    """A model on corrupted rooms, the RGB model under the guide."""
    overrides = [
        f"experiment={ADAPTATIONS[name]}",
        f"run={folder / RUNS[name]}",
        *([f"model.generative.weights={folder / 'guide'}"] if name == "RGB" else []),
        f"data.data_root={folder / 'scenes'}",
        f"output_dir={folder}",
        f"seed={config.seed}",
    ]
    command = "segmill adapt " + " ".join(overrides)
    log.info("\nAdaptation, %s: %s", name, command)
    context = Invocation(
        verb="adapt", argv=(), command=command, overrides=tuple(overrides), dry_run=False
    )
    return compare(compose("adapt", overrides), context)


def depth_table(
    clean: Mapping[str, float], corrupted: Mapping[str, Mapping[str, float]]
) -> TextTable:
    """How much depth protects: mIoU of both models on the rooms as they are, and by method."""
    rows = []
    for name, by_method in corrupted.items():
        values = [clean[name], *(by_method[method] for method in COMPARED)]
        rows.append([name, *map(percent, values)])
    return TextTable(
        "Does depth, which is not corrupted, protect? (mIoU; corrupted: mean over the corruptions)",
        ["model", "not corrupted", *(f"corrupted, {method}" for method in COMPARED)],
        rows,
        "The same rooms, corruptions and order for both models. More in adapted_rgbd/report.html.",
    )


def _report(
    folder: Path,
    scored: dict[str, Scored],
    adapted: list[MethodResult],
    protection: TextTable,
    config: DictConfig,
) -> None:
    """Both models in one report; the pictures are the RGB-D model's best and worst rooms."""
    table = replace(
        adaptation_table(adapted, seed=config.seed),
        title="The RGB model on corrupted rooms, adapted (more in adapted/report.html)",
    )
    rgb, rgbd = scored["RGB"], scored["RGB-D"]
    examples = [
        Example(e.image, e.label, e.pred, e.name, e.miou, {"prediction RGB": other.pred})
        for e, other in zip(examples_of(rgbd), examples_of(rgb, like=rgbd), strict=True)
    ]
    write_report(
        folder / "report.html",
        title="segmill demo",
        command=(folder / "command.txt").read_text(encoding="utf-8").strip(),
        classes=rgb.classes,
        results=[
            Result(name, protocol_text(each.protocol), each.confusion)
            for name, each in scored.items()
        ],
        facts={"environment": "; ".join(environment())},
        curves={
            f"{kind} {key}": curve
            for kind, run_name in RUNS.items()
            for key, curve in curves_of(folder / run_name).items()
            if key in {"train/loss", "val/mIoU"}
        },
        examples=examples,
        tables=[table, protection],
    )
