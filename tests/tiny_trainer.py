"""TTAModule and what it needs to be fitted: the trainer of one process, batches of small images."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from segmill.commands.adapt_trainer import AdaptTrainerSettings
from segmill.data.tasks import Task
from segmill.models.combined import CombinedModel
from segmill.tta.module import TTAModule
from segmill.tta.record import TaskRecord
from tiny_adapt import CLASSES, tiny_views
from tiny_tasks import PROTOCOL

HEIGHT, WIDTH = 40, 66
ONE_CPU = AdaptTrainerSettings(
    accelerator="cpu",
    devices=1,
    nodes=1,
    precision="32-true",
    strategy="fsdp",
    share="classes",
    accumulate=1,
    compile=False,
    cuda_graphs=False,
    deterministic=False,
    log_every=1,
    timeout=60,
    fast_dev_run=False,
)


def module_of(model: CombinedModel, *, num_classes: int = CLASSES, **changes: Any) -> TTAModule:
    """`changes` are other keywords of TTAModule."""
    settings: dict[str, Any] = {
        "model": model,
        "new_record": lambda device: TaskRecord(
            num_classes=num_classes, protocol=PROTOCOL, device=device
        ),
        "seed": 0,
        "predict": "before",
        "compiled": False,
        "cuda_graphs": False,
        "evidence": None,
        "accumulate": 1,
        "share": "classes",
        "strategy": "fsdp",
    }
    return TTAModule(**settings | changes)


def batches(count: int) -> Any:
    """As TaskData.loader gives them; all pixels of an image are of one class."""
    return DataLoader([_batch(index) for index in range(count)], batch_size=None)


def fit(module: TTAModule, folder: Path, task: Task, *, images: int = 3, epochs: int = 1) -> None:
    """One task."""
    module.task = task
    trainer = ONE_CPU.trainer(folder, epochs=epochs, callbacks=[])
    trainer.fit(module, train_dataloaders=batches(images))


def _batch(index: int) -> dict[str, Any]:
    views = tiny_views(HEIGHT, WIDTH, seed=index)
    return {
        "image": views.image,
        "original": views.original,
        "label": torch.full((1, HEIGHT, WIDTH), index % CLASSES, dtype=torch.uint8),
        "name": f"image {index}",
        "size": (HEIGHT, WIDTH),
        "task": 1,
    }
