"""`segmill demo`: the whole path on generated rooms, without a network or a data set.

Trains a small RGB and a small RGB-D model and scores both on rooms that neither has seen; trains a
small guide, corrupts the unseen rooms, and lets the RGB model adapt to them by four methods.
"""

from __future__ import annotations

import logging
import os
import time
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
from segmill.report.html import Result, write_report
from segmill.report.tables import score_line
from segmill.tta.results import MethodResult

log = logging.getLogger(__name__)
MODELS = {"RGB": "demo_rgb", "RGB-D": "demo_rgbd"}
GUIDE, ADAPTATION = "demo_guide", "demo_adapt"


def run(config: DictConfig, context: Invocation) -> None:
    """Generate, train, evaluate, report."""
    started = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = new_run_folder(config.output_dir, config.name)
    write_provenance(folder, config, context.command)
    scored = {name: _train(name, folder, config) for name in MODELS}
    _train_guide(folder, config)
    adapted = _adapt(folder, config)
    _report(folder, scored, adapted, config)
    log.info("\nForty rooms that neither model has seen:")
    for name, each in scored.items():
        log.info("  %-6s %s", name, score_line(each.confusion, protocol=each.protocol.name))
    log.info("\nThe RGB model on the same rooms, corrupted (mIoU, mean over the corruptions):")
    for result in adapted:
        log.info("  %-6s %.2f", result.name, 100 * result.score)
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


def _adapt(folder: Path, config: DictConfig) -> list[MethodResult]:
    """The RGB model on corrupted rooms, under the guide."""
    overrides = [
        f"experiment={ADAPTATION}",
        f"run={folder / 'rgb'}",
        f"model.generative.weights={folder / 'guide'}",
        f"data.data_root={folder / 'scenes'}",
        f"output_dir={folder}",
        f"seed={config.seed}",
    ]
    command = "segmill adapt " + " ".join(overrides)
    log.info("\nAdaptation: %s", command)
    context = Invocation(
        verb="adapt", argv=(), command=command, overrides=tuple(overrides), dry_run=False
    )
    return compare(compose("adapt", overrides), context)


def _report(
    folder: Path, scored: dict[str, Scored], adapted: list[MethodResult], config: DictConfig
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
            for kind, run_name in (("RGB", "rgb"), ("RGB-D", "rgbd"))
            for key, curve in curves_of(folder / run_name).items()
            if key in {"train/loss", "val/mIoU"}
        },
        examples=examples,
        tables=[table],
    )
