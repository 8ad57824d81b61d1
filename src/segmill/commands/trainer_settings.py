"""What configs/trainer and configs/logging say: where and how long to train, what is logged.

No framework: both runtimes read these, and each refuses what it cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from segmill.errors import SegmillError
from segmill.validation import ValidationSchedule


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Where and how long to train; steps are optimizer steps, whatever the accumulation.

    Validation comes every `val_every` steps, of these only where `validation` says so, and last.
    """

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: int | Sequence[int] | Literal["auto"]
    nodes: int
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    max_steps: int
    val_every: int
    accumulate: int
    clip: float | None
    ema: float | None
    sync_batchnorm: Literal["auto", False]
    compile: bool
    channels_last: bool
    deterministic: bool
    benchmark: bool
    log_every: int
    progress: bool
    fast_dev_run: bool
    # With a default, so that files of older runs still fit.
    validation: ValidationSchedule | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "val_every", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise SegmillError(
                    f"trainer.{name}={getattr(self, name)} should be a whole number from 1 on."
                )
        if self.validation is not None and self.val_every != self.validation.epoch_steps:
            raise SegmillError(
                f"trainer.val_every={self.val_every}, but trainer.validation counts epochs of "
                f"{self.validation.epoch_steps} steps. Make them equal, or for a validation every "
                "trainer.val_every steps set trainer.validation=null."
            )


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Weights & Biases; `auto` is online when a key is found and offline otherwise."""

    enabled: bool
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Loggers beside metrics.csv, which is always written."""

    tensorboard: bool
    wandb: WandbSettings

    @classmethod
    def silent(cls) -> LoggingSettings:
        """Only metrics.csv."""
        off = WandbSettings(enabled=False, project="segmill", entity=None, mode="offline")
        return cls(tensorboard=False, wandb=off)
