"""What an adaptation is made of, built once from its configuration and shared by all methods."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from segmill.checkpoint.load import load_weights
from segmill.commands.adapt_refusals import (
    RANDOM,
    refuse_channels,
    refuse_dependent,
    refuse_missing,
    refuse_protocol,
)
from segmill.commands.adapt_rows import Row
from segmill.commands.adapt_trainer import AdaptTrainerSettings
from segmill.configuration import build
from segmill.data.classification_data import ClassificationTaskData
from segmill.data.task_data import TaskData
from segmill.data.tasks import Task
from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel
from segmill.models.discriminative import Discriminative
from segmill.models.generative.guide import Guide
from segmill.protocol import Protocol
from segmill.segmenter import open_segmenter
from segmill.tta.method import Method
from segmill.tta.module import TTAModule
from segmill.tta.sharing import check_accumulates, check_shares_images

log = logging.getLogger(__name__)

AnyTaskData = TaskData | ClassificationTaskData
MIXED = Task(index=1, corruption="mixed", severity=0)


@dataclass(frozen=True)
class AdaptParts:
    """Data, models and the module that adapts them."""

    data: AnyTaskData
    model: CombinedModel
    module: TTAModule
    settings: AdaptTrainerSettings
    protocol: Protocol
    limit: int | None
    chosen: tuple[int, ...] | None  # numbers of tasks; None: all

    @property
    def is_first_process(self) -> bool:
        """Whether this process writes files."""
        rank: Any = rank_zero_only  # known before there is a Trainer, whoever starts the processes
        return rank.rank == 0

    @property
    def images(self) -> int:
        """Images of each task."""
        count = len(self.data.dataset(self.data.tasks[0]))
        return count if self.limit is None else min(self.limit, count)

    @property
    def sharing(self) -> int:
        """Processes that have other images each."""
        return self.settings.processes if self.settings.share == "images" else 1

    @property
    def effective_batch(self) -> int:
        """Images of an optimizer step."""
        return self.data.batch_size * self.settings.accumulate * self.sharing

    @property
    def _limit(self) -> int | None:
        return self.effective_batch if self.settings.fast_dev_run else self.limit

    def images_of(self, *, mixed: bool) -> int:
        """Images of each stream."""
        count = len(self.data.dataset(self.data.tasks[0]))
        each = count if self._limit is None else min(self._limit, count)
        return each * (len(self.data.tasks) if mixed else 1)

    def streams(self, *, mixed: bool) -> list[Task]:
        """What is adapted to, one after the other: the tasks, or all of them as one."""
        if mixed:
            return [MIXED]
        return [
            task for task in self.data.tasks if self.chosen is None or task.index in self.chosen
        ]

    def loader(self, task: Task, *, mixed: bool) -> DataLoader:
        """The images of a task, of all tasks shuffled together when `mixed`."""
        tasks = self.data.tasks if mixed else [task]
        if isinstance(self.data, TaskData):
            return self.data.loader(tasks, limit=self._limit)
        return self.data.loader(tasks, limit=self._limit, share=self.settings.share)

    def methods(self, rows: Mapping[str, Row]) -> dict[str, Method]:
        """The rows' methods; what one of them cannot work with is refused before the first runs."""
        methods = {}
        for name, row in rows.items():
            try:
                self._set(row)
                methods[name] = build(row.config.tta.method, model=self.model)
                if self.chosen is not None:
                    refuse_dependent(row.tta)
                check_accumulates(methods[name], self.settings.accumulate, row.tta.predict)
                if self.sharing > 1:
                    check_shares_images(methods[name], self.settings.strategy)
                if methods[name].parameters_to_update() and row.config.optimizer is None:
                    raise SegmillError(f"tta={row.config.method_name} needs an optimizer.")
            except SegmillError as error:
                raise SegmillError(f"methods: {name}: {error}") from error
        return methods

    def learns(self, row: Row, method: Method) -> bool:
        """Whether the row's method has weights to update under the row's settings."""
        self._set(row)
        return bool(method.parameters_to_update())

    def begin(self, row: Row, method: Method) -> None:
        """Take up the row's method with its settings of the update and the loss."""
        self._set(row)
        optimizer = None if row.config.optimizer is None else build(row.config.optimizer)
        self.module.predict = row.tta.predict
        self.module.begin(method, optimizer, batch_statistics=row.tta.batch_statistics)

    def _set(self, row: Row) -> None:
        self.model.update = build(row.config.model["update"])  # .update is a method of mappings
        self.model.loss = build(row.config.model.loss)

    @property
    def batch(self) -> str:
        """How many images make an optimizer step, in words."""
        if self.effective_batch == 1:
            return "one image a step"
        factors = {
            "a batch": self.data.batch_size,
            "accumulated": self.settings.accumulate,
            "processes": self.sharing,
        }
        several = [f"{count} {name}" for name, count in factors.items() if count > 1]
        product = f" ({' x '.join(several)})" if len(several) > 1 else ""
        return f"effective batch {self.effective_batch}{product}"

    @property
    def amount(self) -> str:
        """How many tasks of how many images, in words."""
        tasks = len(self.streams(mixed=False))
        return f"{tasks} task{'s' * (tasks > 1)} of {self.images} image{'s' * (self.images > 1)}"

    def summary(self) -> str:
        """What runs where, in two lines."""
        discriminative = _count(self.model.discriminative)
        guide = self.model.generative
        guided = "no guide" if guide is None else f"guide {_count(guide.network):,} parameters"
        place = f"{self.settings.processes} x {'GPU' if self.settings.on_gpu else 'CPU'}"
        return (
            f"Model {discriminative:,} parameters, {guided}, {place}, {self.settings.precision}.\n"
            f"{self.amount}, order {self.data.order_hash()}; {self.batch}."
        )


def build_adapt_parts(config: DictConfig) -> AdaptParts:
    """Build everything; what is missing on this machine is said all at once."""
    settings: AdaptTrainerSettings = build(config.trainer)
    protocol: Protocol = build(config.protocol)
    refuse_protocol(protocol)
    if config.limit is not None and config.limit < 1:
        raise SegmillError(f"limit={config.limit} should be 1 or more images, or null for all.")
    guided = config.tta.forward_mode == "tta" and config.model.generative is not None
    refuse_channels(config)
    refuse_missing(config, guided=guided)
    data: AnyTaskData = build(config.data, protocol=protocol, seed=config.seed)
    extra: dict[str, Any] = {"discriminative": _discriminative(config, data)}
    if not guided:
        extra["generative"] = None
    model: CombinedModel = build(config.model, **extra)
    _refuse_other_classes(model.generative, data)
    module = TTAModule(
        model=model,
        new_record=data.new_record,
        seed=config.seed,
        predict=config.tta.predict,
        compiled=settings.compile,
        cuda_graphs=settings.cuda_graphs,
        evidence=None,
        accumulate=settings.accumulate,
        share=settings.share,
        strategy=settings.strategy,
    )
    chosen = _chosen(config, len(data.tasks))
    return AdaptParts(data, model, module, settings, protocol, config.limit, chosen)


def _refuse_other_classes(guide: Guide | None, data: AnyTaskData) -> None:
    """Before the source has gone through all tasks, not at the first guided step."""
    if guide is not None and guide.num_classes != len(data.classes):
        raise SegmillError(
            f"model.generative knows {guide.num_classes} classes and data={data.name} has "
            f"{len(data.classes)}: both models and the data are of the same classes. Choose "
            f"another guide (model/generative=NAME), or one of {len(data.classes)} classes."
        )


def _chosen(config: DictConfig, count: int) -> tuple[int, ...] | None:
    if config.tasks is None:
        return None
    chosen = tuple(int(number) for number in config.tasks)
    if not chosen or not set(chosen) <= set(range(1, count + 1)):
        raise SegmillError(f"tasks={list(chosen)}: the tasks are numbered from 1 to {count}.")
    return chosen


def _discriminative(config: DictConfig, data: AnyTaskData) -> Discriminative:
    if config.run is not None:
        segmenter = open_segmenter(config.run)
        if len(segmenter.classes) != len(data.classes):
            raise SegmillError(
                f"run={config.run} has {len(segmenter.classes)} classes, data={data.name} has "
                f"{len(data.classes)}. Choose the data set that the model was trained for."
            )
        if data.channels == 4 and segmenter.depth_range != data.depth_range:
            log.warning(
                "run=%s was trained with data.depth_range=%s, data=%s has %s: the same distance is "
                "another value for the model. Set data.depth_range, unless that is meant.",
                *(config.run, _listed(segmenter.depth_range), data.name, _listed(data.depth_range)),
            )
        return segmenter.model
    model: Discriminative = build(config.model.discriminative)
    if config.weights == RANDOM:
        _draw(model.network)
    else:
        load_weights(
            model.network,
            config.weights,
            may_miss=tuple(config.weights_may_miss),
            may_leave=tuple(config.weights_may_leave),
        )
    return model.eval()


def _draw(network: nn.Module) -> None:
    """Values that depend on the parameter's name only, so that every process has the same."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                digest = sha256(name.encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)


def _listed(span: tuple[float, float] | None) -> str:
    return "null" if span is None else str([*span])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
