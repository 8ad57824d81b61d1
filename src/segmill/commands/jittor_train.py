"""`segmill train runtime=jittor`: the same data, recipe, protocol, run folder and report."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.training_state import (
    TrainingState,
    read_training_state,
    require_same_network,
    write_training_state,
)
from segmill.checkpoint.write_jittor import write_jittor
from segmill.commands.jittor_evaluate import score
from segmill.commands.jittor_log import RunLog, checked_logging
from segmill.commands.jittor_parts import (
    build_model,
    built,
    checked_settings,
    load_weights,
    save_model,
    use_device,
)
from segmill.commands.reporting import report
from segmill.commands.run_config import (
    require_steps_to_take,
    resume_point,
    resumed_config,
    run_name,
)
from segmill.commands.run_folder import new_run_folder, write_provenance
from segmill.commands.trainer_settings import TrainerSettings
from segmill.configuration import Invocation, build, plain
from segmill.errors import SegmillError
from segmill.evidence import write_evidence
from segmill.jittor import random
from segmill.jittor.data.datamodule import SegmentationData
from segmill.jittor.load import load_arrays, named_arrays, shapes_of
from segmill.jittor.models.discriminative import Discriminative
from segmill.jittor.training import Evaluation, Training
from segmill.metrics import scores
from segmill.model_file import Description

log = logging.getLogger(__name__)
LOGGED = ("mIoU", "mAcc", "aAcc", "FWIoU", "mDice")


@dataclass(frozen=True)
class Parts:
    """What a training run is made of, built from its configuration."""

    model: Discriminative
    data: SegmentationData
    training: Training
    description: Description
    settings: TrainerSettings
    weights: str


def run(config: DictConfig, context: Invocation) -> None:
    """Train, validate, keep the best, and report it."""
    if context.dry_run:
        raise SegmillError(
            "--dry-run is for torch; with runtime=jittor, trainer.fast_dev_run=true takes one step "
            "and writes nothing."
        )
    state, resume = None, None
    if config.resume is not None:
        resume = resume_point(Path(config.resume))
        config = resumed_config(resume.parent, config, context)
        state = read_training_state(resume)
        steps = config.trainer.max_steps
        require_steps_to_take(resume, done=state.step, max_steps=steps, runtime="jittor")
    device = use_device(config.trainer.accelerator)
    parts = build_parts(config, state)
    if parts.settings.fast_dev_run:
        _fast_dev_run(parts)
        return
    logging_settings = checked_logging(build(config.logging))
    # Only now: a run that cannot be built leaves no folder behind.
    folder = resume.parent if resume else new_run_folder(config.output_dir, run_name(config))
    if resume is None:
        write_provenance(folder, config, context.command)
    elif resume.suffix != ".pkl":
        log.info(
            "%s is torch's: weights, AdamW's moments and the step go on here; random draws start "
            "anew and the best checkpoint is chosen among what follows.",
            resume,
        )
    log.info(
        "Run folder: %s\n%s\nJittor on the %s. The first step of a new model or size compiles its "
        "kernels, which takes minutes, once.",
        *(folder, parts.weights, device),
    )
    run_log = RunLog(logging_settings, folder)
    _Fit(parts, folder, run_log, best=float("nan") if state is None else state.best).run()
    run_log.finish()
    load_arrays(parts.model.network, read_checkpoint(folder / "best.pkl"), rules=())
    save_model(folder / "model.safetensors", parts.model, parts.description)
    data = parts.data
    report(score(parts.model, parts.description, data, split=data.val_split), folder)
    split = data.test_split or data.val_split
    log.info("Next: segmill eval runtime=jittor run=%s split=%s protocol=ms_flip", folder, split)


def build_parts(config: DictConfig, state: TrainingState | None) -> Parts:
    """Data, model, optimizer; the weights that were asked for, or the state that goes on."""
    settings = checked_settings(config.trainer)
    if settings.max_steps < 1:
        raise SegmillError(f"trainer.max_steps={settings.max_steps} should be 1 or more.")
    protocol = built(config.protocol)
    data: SegmentationData = built(
        config.data,
        protocol=protocol,
        seed=config.seed,
        accumulate=1,
        start_step=0 if state is None else state.step,
    )
    for split in (data.train_split, data.val_split):
        data.dataset(split)  # missing files are named before anything is made
    model = build_model(config.model, seed=config.seed)
    model.train()
    weights = _load(model, config, state)
    optimizer = built(config.optimizer).build(model.network)
    training = Training(
        model=model,
        optimizer=optimizer,
        schedule=build(config.schedule),
        max_steps=settings.max_steps,
        seed=config.seed,
        step=0 if state is None else state.step,
    )
    if state is not None:
        moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        optimizer.load_state({"step": state.step, **moments})
        if state.random:
            random.set_state(state.random)
    description = Description(
        config=plain(config.model),
        classes=data.classes,
        protocol=protocol,
        depth_range=data.depth_range,
    )
    return Parts(model, data, training, description, settings, weights)


def _load(model: Discriminative, config: DictConfig, state: TrainingState | None) -> str:
    """Load what the run starts from; what that was, in words."""
    if state is not None:
        require_same_network(state.weights, shapes_of(model.network))
        load_arrays(model.network, state.weights, rules=())
        return f"Going on at step {state.step}."
    if config.weights is None:
        count = sum(array.size for array in named_arrays(model.network).values())
        return f"{count:,} values, random start"
    found = load_weights(
        model,
        config.weights,
        may_miss=tuple(config.weights_may_miss),
        may_leave=tuple(config.weights_may_leave),
    )
    return f"{found.text()}\nModel-only weights: training starts at step 0."


def _fast_dev_run(parts: Parts) -> None:
    batch = next(parts.data.train_batches())
    _require_finite(parts.training.take_step(batch), batch, parts.training.step, None)
    _validate(parts, limit=1)
    log.info("fast_dev_run: one step of training and validation went through.")


class _Fit:
    """The loop: steps, lines of progress, validations, and what must survive an interruption."""

    def __init__(self, parts: Parts, folder: Path, run_log: RunLog, *, best: float) -> None:
        self._parts, self._folder, self._log, self._best = parts, folder, run_log, best

    def run(self) -> None:
        training, settings = self._parts.training, self._parts.settings
        batches = self._parts.data.train_batches()
        started, first = time.perf_counter(), training.step
        waiting = 0.0
        try:
            while training.step < settings.max_steps:
                asked = time.perf_counter()
                batch = next(batches)
                waiting = time.perf_counter() - asked
                with _whole():
                    terms = training.take_step(batch)
                _require_finite(terms, batch, training.step, self._folder / "evidence")
                pace = (time.perf_counter() - started) / (training.step - first)
                self._after_step(terms, waiting=waiting, pace=pace)
        except KeyboardInterrupt:
            self._save()
            log.warning(
                "Stopped at step %d; last.pkl is written. Go on with:\n  segmill train "
                "runtime=jittor resume=%s",
                training.step,
                self._folder,
            )
            raise

    def _after_step(self, terms: Mapping[str, float], *, waiting: float, pace: float) -> None:
        """Rows carry Lightning's number of the step, from 0, and the rate of the next one."""
        training, settings = self._parts.training, self._parts.settings
        step, last = training.step, settings.max_steps
        loss, rate = sum(terms.values()), training.rate if step < last else 0.0
        if step % settings.log_every == 0 or step == last:
            values = {f"train/{name}": value for name, value in terms.items()}
            more = {"train/loss": loss, "train/lr": rate, "train/data_time": waiting}
            self._log.write(step - 1, values | more)
        if settings.progress and step % max(last // 40, 1) == 0:
            log.info(
                "step %d/%d  loss %.4g  lr %.4g  data_time %.4g  %.0f s left",
                *(step, last, loss, rate, waiting, pace * (last - step)),
            )
        due = step % settings.val_every == 0 and (
            settings.validation is None or settings.validation.due(step)
        )
        if due or step == last:
            self._validate()

    def _validate(self) -> None:
        step = self._parts.training.step
        values = _validate(self._parts, limit=None)
        self._log.write(step - 1, values)
        score = values["val/mIoU"]
        log.info("step %d  val/mIoU %.4f", step, score)
        if np.isnan(self._best) or score > self._best:
            self._best = score
            write_jittor(self._folder / "best.pkl", named_arrays(self._parts.model.network))
        self._save()

    def _save(self) -> None:
        moments = self._parts.training.optimizer.state()
        write_training_state(
            self._folder / "last.pkl",
            TrainingState(
                weights=named_arrays(self._parts.model.network),
                exp_avg=moments["exp_avg"],
                exp_avg_sq=moments["exp_avg_sq"],
                step=self._parts.training.step,
                random=random.state(),
                best=self._best,
            ),
        )


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C within waits for the end, since a state of half a step cannot be gone on from.

    A second one ends the process at once; nothing is written then.
    """
    asked = False

    def note(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise SystemExit(130)
        asked = True
        log.warning("Stopping after this step; Ctrl-C again stops at once and writes nothing.")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _validate(parts: Parts, *, limit: int | None) -> dict[str, float]:
    """Scores of the validation split, of its first `limit` images only if that is given."""
    classes, protocol = parts.description.classes, parts.description.protocol
    evaluation = Evaluation(parts.model, protocol, num_classes=len(classes))
    items = parts.data.eval_items(parts.data.val_split)
    evaluation.run(items if limit is None else (next(items) for _ in range(limit)))
    result = scores(evaluation.confusion, absent_class=protocol.absent_class)
    values = {f"val/{name}": float(result[name]) for name in LOGGED}
    per_class = zip(classes.names, np.asarray(result["IoU"]), strict=True)
    return values | {f"val/IoU/{name}": float(value) for name, value in per_class}


def _require_finite(
    terms: Mapping[str, float], batch: Mapping[str, Any], step: int, evidence: Path | None
) -> None:
    if all(np.isfinite(value) for value in terms.values()):
        return
    kept = ""
    if evidence is not None:
        names: Sequence[str] = batch["name"]
        write_evidence(
            evidence,
            step=step,
            terms=terms,
            names=names,
            gradient_norms={},
            images=batch["image"],
            labels=batch["label"],
        )
        kept = f" Batch names and pictures are in {evidence}."
    raise SegmillError(
        f"The loss at step {step} is not finite ({dict(terms)}).{kept} Usual causes: a learning "
        "rate that is too high (optimizer.learning_rate), or labels of a wrong data set (segmill "
        "data check)."
    )
