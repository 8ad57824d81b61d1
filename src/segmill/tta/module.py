"""TTAModule: one batch at a time through an adaptation method, scored before the update.

It knows no model: a method says which parameters it updates and what its loss is. One module
serves all methods and tasks; `begin` chooses the method and starts from the source's weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.data.tasks import Task
from segmill.draws import draws_from
from segmill.errors import SegmillError
from segmill.evidence import write_evidence
from segmill.models.combined import CombinedModel
from segmill.optim import OptimizerSettings
from segmill.tta.batch_statistics import BatchStatistics
from segmill.tta.method import Method, Views
from segmill.tta.record import Record, names_of
from segmill.tta.sharding import (
    Snapshot,
    compile_blocks,
    forget_gathered,
    repeated_blocks,
    shard,
    world_size,
)


class TTAModule(lightning.LightningModule):
    """Adapts `model` to the images of one task after another; a Trainer fits it once for each.

    Batches are those of the task data's loader, `new_record` is the task data's: one image of
    segmentation, one or more of classification. `on_images(first, batch, pred)` is called for every
    batch with the number of its first image, which is how pictures for a report are kept;
    `evidence` is a folder for images whose loss is not finite.
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        new_record: Callable[[torch.device], Record],
        seed: int,
        predict: Literal["before", "after"],
        compiled: bool,
        evidence: Path | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.new_record, self.seed = new_record, seed
        self.predict, self.compiled, self.evidence = predict, compiled, evidence
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
            compile_blocks(repeated_blocks(network) + ([] if guide is None else guide.blocks()))
        mesh = self._device_mesh
        if mesh is not None and world_size() > 1:
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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adapt to a batch, and count its predictions from before (or after) the update."""
        started = self._now()
        views = Views(image=batch["image"], original=batch["original"])
        method_seed, network_seed = self._draw_seeds(batch_idx)
        generator = torch.Generator(self.device).manual_seed(method_seed)
        with draws_from(network_seed, self.device):
            logits, loss = self.method.adapt(views, _Updater(self), generator)
            if self.predict == "after":
                with torch.no_grad():
                    logits = self.method.predict(views)
        value = float(loss)
        if not math.isfinite(value):
            self._stop(value, batch)
        seconds = self._now() - started
        pred = self.record.add(batch, logits, loss=value, seconds=seconds)
        self.on_images(len(self.record.course.names) - len(pred), batch, pred)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _draw_seeds(self, batch_idx: int) -> tuple[int, int]:
        """Of what the method draws, and of what networks draw in their forward pass.

        The same on every process; others for every task, epoch and image.
        """
        task = 0 if self.task is None else self.task.index
        words = [self.seed, task, self.current_epoch, batch_idx]
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
            f"The loss of image {', '.join(names)} (number {seen + 1} of its task) "
            f"is {loss}.{kept} Usual causes: optimizer.learning_rate is too high for this model, "
            "or the guide's weights are not what model.generative says."
        )


class _Updater:
    """The optimizer of a TTAModule, through Lightning's precision and strategy."""

    def __init__(self, module: TTAModule) -> None:
        self._module = module

    def backward(self, loss: Float[Tensor, ""]) -> None:
        self._module.manual_backward(loss)

    def step(self) -> None:
        self._optimizer.step()
        self.zero_grad()
        # Autocast would go on with the weights' copies from before the step.
        torch.clear_autocast_cache()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def forget(self) -> None:
        self._optimizer.optimizer.state.clear()

    @property
    def _optimizer(self) -> Any:
        return self._module.optimizers()


def _ignore(first: int, batch: dict[str, Any], pred: Tensor) -> None:
    """Keep no picture."""
