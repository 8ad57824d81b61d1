"""SegmentationModule: one optimizer step on a global batch, validation under a protocol.

The families' losses are summed and nothing else happens to them here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.evaluation import ConfusionMetric, predict_batch
from segmill.evidence import write_evidence
from segmill.metrics import scores
from segmill.models.discriminative import Discriminative
from segmill.optim import OptimizerSettings, StepSchedule
from segmill.photometric import photometric_distortion
from segmill.protocol import Protocol
from segmill.schedules import Schedule
from segmill.seeds import step_seed

# The other scalars of metrics.json say the same in other words (mRecall is mAcc).
LOGGED = ("mIoU", "mAcc", "aAcc", "FWIoU", "mDice")


class SegmentationModule(lightning.LightningModule):
    """Train `model` and score it; batches are those of `segmill.data.datamodule`."""

    def __init__(
        self,
        *,
        model: Discriminative,
        optimizer: OptimizerSettings,
        schedule: Schedule,
        protocol: Protocol,
        class_names: tuple[str, ...],
        max_steps: int,
        seed: int,
        evidence: Path,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_settings = optimizer
        self.schedule_settings = schedule
        self.protocol = protocol
        self.class_names = class_names
        self.max_steps = max_steps
        self.seed = seed
        self.evidence = evidence
        self.metric = ConfusionMetric(
            num_classes=len(class_names), ignore_index=protocol.ignore_index
        )
        self._watch = _FiniteWatch()
        self._random_state: dict[str, Any] | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Float[Tensor, ""]:
        """Sum of the family's losses on one micro-batch."""
        self._stop_if_not_finite()
        torch.manual_seed(step_seed(self.seed, batch_idx, self.global_rank))
        image = photometric_distortion(batch["image"], batch["jitter"])
        terms = self.model.losses(image, batch["label"], batch["valid"])
        loss = torch.stack(list(terms.values())).sum()
        self._watch.remember(self.global_step, batch_idx, loss, terms, batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return loss

    def validation_step(self, batch: dict[str, Any]) -> None:
        """Predict one image under the protocol and count it."""
        self.metric.update(predict_batch(self.model, batch, self.protocol), batch["label"])

    def on_validation_epoch_start(self) -> None:
        """Never score a model that is already broken."""
        self._stop_if_not_finite()

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the accumulated confusion matrix, the same in every process."""
        result = scores(self.metric.total().cpu().numpy(), absent_class=self.protocol.absent_class)
        self.metric.reset()
        values = {f"val/{name}": float(result[name]) for name in LOGGED}
        values |= {
            f"val/IoU/{name}": float(value)
            for name, value in zip(self.class_names, np.asarray(result["IoU"]), strict=True)
        }
        self.log_dict(values)
        self.log("mIoU", values["val/mIoU"], prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        """Parameter groups by rule, and a schedule that moves every step."""
        optimizer = self.optimizer_settings.build(self.model.network)
        scheduler = StepSchedule(optimizer, self.schedule_settings, max_steps=self.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """The rate that the next step uses; groups with lr_mult follow it."""
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/lr", rate, prog_bar=True)

    def on_train_end(self) -> None:
        """The last step's loss is looked at too."""
        self._stop_if_not_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Random states travel with the weights, so that a resumed run draws what it would have."""
        checkpoint["segmill_random_state"] = random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the saved random state until training really starts."""
        self._random_state = checkpoint.get("segmill_random_state")

    def on_train_start(self) -> None:
        """Restore the random state last: building and loading draw numbers too."""
        if self._random_state is not None:
            restore_random_state(self._random_state)

    def _stop_if_not_finite(self) -> None:
        if not self._watch.broken():
            return
        folder = self.evidence / f"rank{self.global_rank}"
        write_evidence(folder, **self._watch.record(self.model))
        raise SegmillError(
            f"The loss at step {self._watch.step} is not finite "
            f"({self._watch.describe()}). Batch names, gradient norms and pictures are in {folder}."
            f" Usual causes: a learning rate that is too high (optimizer.learning_rate), fp16 "
            f"instead of bf16 (trainer.precision), or labels of a wrong data set (segmill data "
            f"check)."
        )


class _FiniteWatch:
    """Looks at each loss one step later, so that the GPU never waits for the answer."""

    def __init__(self) -> None:
        self.step = -1
        self._host: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._terms: Mapping[str, Tensor] = {}
        self._batch: dict[str, Any] = {}

    def remember(
        self,
        step: int,
        batch_idx: int,
        loss: Float[Tensor, ""],
        terms: Mapping[str, Tensor],
        batch: dict[str, Any],
    ) -> None:
        self.step, self.batch_idx = step, batch_idx
        self._terms = {name: value.detach() for name, value in terms.items()}
        self._batch = batch
        if loss.is_cuda:
            self._host = torch.empty((), dtype=torch.float32, pin_memory=True)
            self._host.copy_(loss.detach().float(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host, self._ready = loss.detach(), None

    def broken(self) -> bool:
        if self._host is None:
            return False
        if self._ready is not None:
            self._ready.synchronize()
        return not bool(torch.isfinite(self._host))

    def describe(self) -> str:
        return ", ".join(f"{name} {float(value):.4g}" for name, value in self._terms.items())

    def record(self, model: nn.Module) -> dict[str, Any]:
        return {
            "step": self.step,
            "terms": {name: float(value) for name, value in self._terms.items()},
            "names": list(self._batch["name"]),
            "gradient_norms": {
                name: float(parameter.grad.norm())
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            },
            "images": self._batch["image"].cpu().numpy(),
            "labels": self._batch["label"].cpu().numpy(),
        }


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, in types that load safely."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": list(random.getstate()[1]),
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`; GPUs that are not there are left out."""
    random.setstate((3, tuple(state["python"]), None))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
