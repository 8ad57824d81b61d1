"""The trainer of an adaptation: its settings (configs/trainer/adapt*.yaml), one Trainer a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from segmill.commands.quiet import quiet_lightning
from segmill.commands.ranks import WatchedProcesses
from segmill.errors import SegmillError


@dataclass(frozen=True, kw_only=True)
class AdaptTrainerSettings:
    """Where an adaptation runs. Several devices shard both models and split the classes."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: int | Sequence[int] | Literal["auto"]
    nodes: int
    precision: Literal["32-true", "bf16-mixed"]
    compile: bool
    deterministic: bool
    log_every: int
    timeout: int
    fast_dev_run: bool

    def __post_init__(self) -> None:
        for name in ("nodes", "log_every", "timeout"):
            if getattr(self, name) < 1:
                raise SegmillError(
                    f"trainer.{name}={getattr(self, name)} should be a whole number from 1 on."
                )

    @property
    def on_gpu(self) -> bool:
        """Whether GPUs are used."""
        return self.accelerator != "cpu" and torch.cuda.is_available()

    @property
    def processes(self) -> int:
        """Processes of the run: devices of one node times nodes."""
        devices = self._devices
        return (devices if isinstance(devices, int) else len(devices)) * self.nodes

    def trainer(self, folder: Path, *, epochs: int, callbacks: list[Callback]) -> lightning.Trainer:
        """A Trainer for one task; without checkpoints, as every task starts from the source."""
        quiet_lightning()
        return lightning.Trainer(
            accelerator=self.accelerator,
            devices=self._devices,
            num_nodes=self.nodes,
            strategy=self._strategy(),
            precision=self.precision,
            deterministic=self.deterministic,
            max_epochs=epochs,
            use_distributed_sampler=False,  # every process works on the same image
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=callbacks,
            default_root_dir=folder,
        )

    @property
    def _devices(self) -> int | list[int]:
        if isinstance(self.devices, int):
            return self.devices
        if self.devices == "auto":
            return torch.cuda.device_count() if self.on_gpu else 1
        return [int(index) for index in self.devices]

    def _strategy(self) -> Any:
        """Lightning's FSDP2 for several processes; a process that waits too long gives up."""
        if self.processes == 1:
            return "auto"
        return WatchedProcesses(
            data_parallel_size=self.processes,
            tensor_parallel_size=1,
            timeout=timedelta(seconds=self.timeout),
        )
