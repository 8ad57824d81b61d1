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
    """Where an adaptation runs.

    Several processes `share` the classes of an image, or the images: then `strategy` says whether
    weights are sharded (fsdp) or every process has all of them (ddp). `accumulate` batches make a
    step; the last one of a task has what is left.
    """

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: int | Sequence[int] | Literal["auto"]
    nodes: int
    precision: Literal["32-true", "bf16-mixed"]
    strategy: Literal["fsdp", "ddp"]
    share: Literal["classes", "images"]
    accumulate: int
    compile: bool
    cuda_graphs: bool
    deterministic: bool
    log_every: int
    timeout: int
    fast_dev_run: bool

    def __post_init__(self) -> None:
        for name in ("nodes", "accumulate", "log_every", "timeout"):
            if getattr(self, name) < 1:
                raise SegmillError(
                    f"trainer.{name}={getattr(self, name)} should be a whole number from 1 on."
                )
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise SegmillError(
                "trainer.accelerator=gpu, but torch sees no GPU here (segmill doctor says more). "
                "trainer=adapt_cpu runs on the CPU."
            )
        self._check_devices()
        self._check_cuda_graphs()
        if self.strategy == "ddp" and self.share == "classes" and self.processes > 1:
            raise SegmillError(
                "trainer.strategy=ddp with trainer.share=classes: processes that have all weights "
                "share images. Set trainer.share=images, or trainer.strategy=fsdp."
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
            use_distributed_sampler=False,  # the data's loader knows what each process takes
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

    def _check_cuda_graphs(self) -> None:
        """Only whole weights on a GPU can be recorded."""
        if self.cuda_graphs and not self.on_gpu:
            raise SegmillError(
                "trainer.cuda_graphs=true is for GPUs, and this run uses none. Set it to false."
            )
        if self.cuda_graphs and self.processes > 1 and self.strategy == "fsdp":
            raise SegmillError(
                "trainer.cuda_graphs=true needs whole weights on every GPU, and trainer.strategy="
                "fsdp shards them. Set trainer.cuda_graphs=false, or trainer.strategy=ddp with "
                "trainer.share=images."
            )

    def _check_devices(self) -> None:
        """A count of 1 or more; on GPUs no more than there are, or their numbers."""
        if isinstance(self.devices, int):
            wrong = self.devices < 1 or (self.on_gpu and self.devices > torch.cuda.device_count())
        elif self.devices == "auto":
            wrong = False
        else:
            there = range(torch.cuda.device_count()) if self.on_gpu else ()
            wrong = not self.devices or any(index not in there for index in self.devices)
        if wrong and self.on_gpu:
            raise SegmillError(
                f"trainer.devices={self.devices}: {torch.cuda.device_count()} GPUs are visible "
                "(CUDA_VISIBLE_DEVICES decides). Give a count up to that, a list of their numbers "
                "from 0 on, or auto."
            )
        if wrong:
            raise SegmillError(
                f"trainer.devices={self.devices}: on the CPU this is the number of processes, 1 or "
                "more; auto is 1."
            )

    def _strategy(self) -> Any:
        """Lightning's FSDP2, whatever is sharded; a process that waits too long gives up."""
        if self.processes == 1:
            return "auto"
        return WatchedProcesses(
            data_parallel_size=self.processes,
            tensor_parallel_size=1,
            timeout=timedelta(seconds=self.timeout),
        )
