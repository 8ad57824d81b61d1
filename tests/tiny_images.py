"""Small images in batches and a small classifier under a guide, for one process or two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from segmill.commands.adapt_trainer import AdaptTrainerSettings
from segmill.data.image_batches import ImageBatches
from segmill.data.loader import place_of_process
from segmill.data.tasks import Task
from segmill.models.combined import CombinedModel
from segmill.optim import SGD
from segmill.tta.classification_record import ClassificationRecord
from segmill.tta.module import TTAModule
from segmill.tta.results import TaskResult
from tiny_adapt import CLASSES, TinyGuide, tiny_model, tiny_views

SIDE = 32
LOSS: dict[str, Any] = {
    "topk": 2,
    "min_classes": 4,
    "classes_threshold": 4,
    "fill": "softmax",
    "mse": 0.0,
    "norm_l2": 1.0,
    "cosine": 1.0,
    "windows_at_once": None,
}


class Pooled(nn.Module):
    """The mean logits of an image: a classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 8 * self.network(image).mean(dim=(2, 3), keepdim=True)


class MixingGuide(TinyGuide):
    """Mixes the predictions of the classes, where real guides mix their vectors."""

    def predict_mixed(self, noisy_latent, t, classes, weights):
        return (self.predict(noisy_latent, t, classes) * weights[..., None, None, None]).sum(dim=1)


def tiny_classifier(**loss: Any) -> CombinedModel:
    """The same weights every time."""
    model = tiny_model(view=(SIDE, None, None), **LOSS | loss)
    assert model.generative is not None
    guide = MixingGuide(num_classes=CLASSES, view=model.generative.view)
    guide.load_state_dict(model.generative.state_dict())
    model.discriminative.network = Pooled(model.discriminative.network)
    return CombinedModel(
        discriminative=model.discriminative,
        generative=guide,
        update=model.update,
        loss=model.loss,
    ).eval()


def item(index: int) -> dict[str, Any]:
    views = tiny_views(SIDE, SIDE, seed=index)
    label = torch.tensor([[[index % CLASSES]]])
    return {"image": views.image, "label": label, "name": f"image {index}"}


def as_batch(items: list[dict[str, Any]]) -> dict[str, Any]:
    image = torch.cat([each["image"] for each in items])
    return {
        "image": image,
        "original": image,
        "label": torch.cat([each["label"] for each in items]),
        "name": [each["name"] for each in items],
        "size": (1, 1),
        "task": [1] * len(items),
    }


def image_loader(count: int, batch: int) -> DataLoader:
    """`batch` images a process, as ClassificationTaskData has them."""
    batches = ImageBatches(count=count, batch_size=batch, place=place_of_process)
    items = [item(index) for index in range(count)]
    return DataLoader(items, batch_sampler=batches, collate_fn=as_batch)


def image_module(model: CombinedModel, **changes: Any) -> TTAModule:
    """`changes` are other keywords of TTAModule."""
    settings: dict[str, Any] = {
        "model": model,
        "new_record": lambda device: ClassificationRecord(
            num_classes=CLASSES, ignore_index=-1, device=device
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


def adapt_images(
    method: Callable[[CombinedModel], Any],
    folder: Path,
    *,
    count: int,
    batch: int,
    devices: int = 1,
    rate: float = 0.02,
    **changes: Any,
) -> tuple[TTAModule, TaskResult]:
    """One task of `count` images by plain descent with momentum, and what it leaves."""
    model = tiny_classifier()
    module = image_module(model, **changes)
    module.task = Task(1, "fog", 5)
    settings = SGD(
        learning_rate=rate, weight_decay=0.0, momentum=0.9, rules={}, norm_decay_mult=None
    )
    module.begin(method(model), settings, batch_statistics=False)
    trainer = AdaptTrainerSettings(
        accelerator="cpu",
        devices=devices,
        nodes=1,
        precision="32-true",
        strategy=module.strategy_name,
        share=module.share,
        accumulate=module.accumulate,
        compile=False,
        cuda_graphs=False,
        deterministic=False,
        log_every=1,
        timeout=60,
        fast_dev_run=False,
    ).trainer(folder, epochs=1, callbacks=[])
    trainer.fit(module, train_dataloaders=image_loader(count, batch))
    if devices > 1:
        module.record.gather()
    return module, module.record.result(task="01_fog_5", corruption="fog", severity=5)
