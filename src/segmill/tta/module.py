"""TTAModule: one batch at a time through an adaptation method, scored before the update.

It knows no model: a method says which parameters it updates and what its loss is. One module
serves all methods and tasks; `begin` chooses the method and starts from the source's weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segmill.data.tasks import Task
from segmill.draws import draws_from
from segmill.errors import SegmillError
from segmill.evidence import write_evidence
from segmill.models.combined import CombinedModel
from segmill.optim import OptimizerSettings
from segmill.tta.batch_statistics import BatchStatistics
from segmill.tta.cuda_graphs import replay_passes
from segmill.tta.method import Method, Views
from segmill.tta.record import Record, names_of
from segmill.tta.sharding import (
    Snapshot,
    compile_parts,
    forget_gathered,
    shard,
    world_size,
)
from segmill.tta.sharing import (
    accumulates,
    check_accumulates,
    check_shares_images,
    shared_images,
)
from segmill.tta.step_plan import step_plan
from segmill.tta.updaters import DirectUpdater, GatheringUpdater

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class _Adapted:
    """A batch that was adapted to and is not counted yet; `first` is the number of its image 0."""

    first: int
    batch: dict[str, Any]
    logits: Float[Tensor, "B K h w"]
    loss: Float[Tensor, ""]


class TTAModule(lightning.LightningModule):
    """Adapts `model` to the images of one task after another; a Trainer fits it once for each.

    Batches are those of the task data's loader, `new_record` is the task data's: one image of
    segmentation, one or more of classification. `on_images(first, batch, pred)` is called for every
    batch with the number of its first image, which is how pictures for a report are kept;
    `evidence` is a folder for images whose loss is not finite.

    `accumulate` batches make a step of the optimizer. Several processes `share` the classes of an
    image or the images of a batch; `strategy` says whether weights are sharded (fsdp) or whole
    (ddp, where images are shared).
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        new_record: Callable[[torch.device], Record],
        seed: int,
        predict: Literal["before", "after"],
        compiled: bool,
        cuda_graphs: bool,
        evidence: Path | None,
        accumulate: int,
        share: Literal["classes", "images"],
        strategy: Literal["fsdp", "ddp"],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.new_record, self.seed = new_record, seed
        self.predict: Literal["before", "after"] = predict
        self.compiled, self.evidence = compiled, evidence
        self.cuda_graphs = cuda_graphs
        self.accumulate = accumulate
        self.share: Literal["classes", "images"] = share
        self.strategy_name: Literal["fsdp", "ddp"] = strategy
        model.shares_classes = share == "classes"
        self.on_images: Callable[[int, dict[str, Any], Tensor], None] = _ignore
        self.task: Task | None = None
        self._configured = False
        self._method: Method | None = None
        self._settings: OptimizerSettings | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._statistics: BatchStatistics | None = None
        self._snapshot: Snapshot | None = None

    @property
    def method(self) -> Method:
        """The method that adapts at present."""
        if self._method is None:
            raise ValueError("TTAModule has no method yet; call begin() first.")
        return self._method

    def begin(
        self, method: Method, optimizer: OptimizerSettings | None, *, batch_statistics: bool
    ) -> None:
        """Go on with another method; the weights are the source's, whatever the last one did."""
        check_accumulates(method, self.accumulate, self.predict)
        if self._snapshot is not None:
            self.reset()
            self._snapshot = None
        if self._statistics is not None:
            self._statistics.undo()
        self._statistics = None
        if batch_statistics:
            self._statistics = BatchStatistics(self.model.discriminative)
            self._statistics.apply()
        self._method, self._settings, self._optimizer = method, optimizer, None

    def reset(self) -> None:
        """Weights bit for bit as before the first task, no optimizer state, no memory."""
        if self._snapshot is not None:
            self._snapshot.restore()
            forget_gathered(self.model)
        self.method.reset()
        self._optimizer = None

    def configure_model(self) -> None:
        """Compile, shard and load once, with the first Trainer; later ones find it done."""
        if self._configured:
            return
        guide = self.model.generative
        network: nn.Module = self.model.discriminative.network
        if self.compiled:
            compile_parts(self.model)
        mesh = self._device_mesh
        if mesh is not None and world_size() > 1 and self.strategy_name == "fsdp":
            over = mesh["data_parallel"]
            # Gathered at once: 85 M weights take a millisecond, the hooks of 52 blocks many. Their
            # type stays, BatchNorm takes no mixed ones: autocast alone decides here.
            shard(network, (), over, compute_dtype=None, keep_gathered=False)
            if guide is not None:
                mixed = self.trainer.precision == "bf16-mixed"
                dtype = torch.bfloat16 if mixed else None
                blocks = guide.blocks()
                shard(guide.network, blocks, over, compute_dtype=dtype, keep_gathered=True)
        if guide is not None:
            guide.fill(self.trainer.strategy.root_device)
        if self.cuda_graphs:
            replay_passes(self.model)
        self._configured = True

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """An optimizer of what the method updates; a continual run goes on with the one it has."""
        updated = self.method.parameters_to_update()
        chosen = {id(parameter) for parameter in updated.values()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        if self._snapshot is None:
            buffers = dict(self.model.discriminative.named_buffers(prefix="discriminative"))
            self._snapshot = Snapshot({**updated, **buffers})
        if updated and self._optimizer is None:
            if self._settings is None:
                raise SegmillError(
                    f"{type(self.method).__name__} updates weights, but optimizer is null. Set it "
                    "in the method's file in configs/tta."
                )
            self._optimizer = self._settings.build(self.model)
        return self._optimizer

    def on_train_start(self) -> None:
        """Adaptation runs in eval mode: no dropout, no drop path, no moving averages."""
        self.eval()

    def on_train_epoch_start(self) -> None:
        """Count anew: of several epochs the last one is what is reported."""
        self.record = self.new_record(self.device)
        self._uncounted: list[_Adapted] = []
        shared = self.share == "images" and world_size() > 1
        loader = self.trainer.train_dataloader
        assert isinstance(loader, DataLoader)
        self.plan = step_plan(
            loader,
            accumulate=self.accumulate,
            rank=self.global_rank if shared else 0,
            processes=world_size() if shared else 1,
        )
        updated = list(self.method.parameters_to_update().values())
        if shared:
            check_shares_images(self.method, self.strategy_name)
        alone = shared_images(self.method) == "alone"
        averages = shared and self.strategy_name == "ddp" and not alone
        gathers = accumulates(self.method) and (shared or self.accumulate > 1)
        updater = GatheringUpdater if gathers else DirectUpdater
        self._updater = updater(self, updated if averages else [])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adapt to a batch, and count its predictions from before (or after) the update.

        The device is waited for once a step of the optimizer, when its batches are counted.
        """
        if not self._uncounted:
            self._began = self._now()
        plan, updater = self.plan, self._updater
        own = plan.own(batch_idx)
        seeds = tuple(self._draw_seeds(position)[0] for position in own)
        views = Views(
            image=batch["image"],
            original=batch["original"],
            seeds=seeds,
            weight=plan.factor(batch_idx),
        )
        # What is drawn for the step, for its weights above all, is the same on every process.
        step_seed, _ = self._draw_seeds(plan.batches[batch_idx].start)
        generator = torch.Generator(self.device).manual_seed(step_seed)
        with draws_from(self._draw_seeds(own.start)[1], self.device):
            logits, loss = self.method.adapt(views, updater, generator)
            if isinstance(updater, GatheringUpdater) and plan.ends_step(batch_idx):
                updater.finish()
            if self.predict == "after":
                with torch.no_grad():
                    logits = self.method.predict(views)
        self._uncounted.append(_Adapted(own.start, batch, logits.detach(), loss.detach()))
        if plan.ends_step(batch_idx):
            self._count()

    def _count(self) -> None:
        """Record the batches of a step; each image has its share of the step's time."""
        losses = torch.stack([each.loss for each in self._uncounted]).tolist()
        images = sum(len(each.logits) for each in self._uncounted)
        seconds = (self._now() - self._began) / images
        for each, loss in zip(self._uncounted, losses, strict=True):
            if not math.isfinite(loss):
                self._stop(loss, each.batch)
            took = seconds * len(each.logits)
            pred = self.record.add(each.batch, each.logits, loss=loss, seconds=took)
            self.on_images(each.first, each.batch, pred)
        self._uncounted.clear()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _draw_seeds(self, position: int) -> tuple[int, int]:
        """Of what the method draws, and of what networks draw in their forward pass.

        The same on every process; others for every task, epoch and image of the task.
        """
        task = 0 if self.task is None else self.task.index
        words = [self.seed, task, self.current_epoch, position]
        of_method, of_networks = np.random.SeedSequence(words).generate_state(2, np.uint64)
        return int(of_method >> 1), int(of_networks >> 1)

    def _stop(self, loss: float, batch: dict[str, Any]) -> None:
        names, seen = names_of(batch), len(self.record.course.names)
        kept = ""
        if self.evidence is not None:
            folder = self.evidence / f"rank{self.global_rank}"
            write_evidence(
                folder,
                step=seen,
                terms={"loss": loss},
                names=names,
                gradient_norms={},
                images=batch["original"].cpu().numpy(),
                labels=batch["label"].cpu().numpy(),
            )
            kept = f" What was seen is kept in {folder}."
        raise SegmillError(
            f"The loss of {_placed(names, seen + 1)} is {loss}.{kept} Usual causes: "
            "optimizer.learning_rate is too high for this model, or the guide's weights are not "
            "what model.generative says."
        )


def _placed(names: Sequence[str], number: int) -> str:
    """Images of a batch, the first of which is the task's `number`-th."""
    if len(names) == 1:
        return f"image {names[0]} (number {number} of its task)"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"images {', '.join(names[:SHOWN])}{more} (from number {number} of their task on)"


def _ignore(first: int, batch: dict[str, Any], pred: Tensor) -> None:
    """Keep no picture."""
