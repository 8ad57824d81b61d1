"""What one of two processes does in tta/test_shared_images.py, and one alone for comparison."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from segmill.models.combined import CombinedModel
from segmill.paths import CONFIGS
from segmill.tta.dusa import Dusa
from segmill.tta.dusa_u import DusaU
from segmill.tta.method import Views
from tiny_images import adapt_images, item
from tiny_methods import method_of

COUNT = 11  # steps of 4, 4 and 3: the last is 2 images for one process and 1 for the other
SEEN = item(3)  # what is predicted in the end, by a teacher where there is one


def cotta(model: CombinedModel) -> Any:
    return method_of("cotta", model, ratios=[1.0], flip=False, momentum=0.5, restore=0.3)


def eata(model: CombinedModel, **settings: Any) -> Any:
    return method_of("eata", model, entropy_share=0.7, redundancy=0.99, **settings)


def eata_fisher(model: CombinedModel) -> Any:
    fisher = OmegaConf.load(CONFIGS / "tta" / "eata_fisher.yaml").tta.method.fisher
    return eata(model, fisher=OmegaConf.merge(fisher, {"images": 4, "strength": 5.0}))


def cotta_classification(model: CombinedModel) -> Any:
    few = {"copies": 2, "threshold": 0.8, "momentum": 0.5, "restore": 0.3}
    return method_of("cotta_classification", model, **few)


METHODS: dict[str, Callable[[CombinedModel], Any]] = {
    "source": lambda model: method_of("source", model),
    "bn": lambda model: method_of("bn", model),
    "dusa": lambda model: Dusa(model=model, step="image"),
    "dusa_u": lambda model: DusaU(model=model, step="image"),
    "tent": lambda model: method_of("tent", model),
    # These need every step at once: their gradients are averaged after every backward pass.
    "cotta": cotta,
    "cotta_classification": cotta_classification,
    "sar": lambda model: method_of("sar", model, entropy_share=1.0, recover_below=0.0),
    "eata": eata,
    "eata_fisher": eata_fisher,
    # Steps inside a batch, after images 3, 6 and 9, and a memory whose classes overflow.
    "rotta": lambda model: method_of("rotta", model, capacity=14, update_every=3, momentum=0.5),
    # Image by image.
    "memo": lambda model: method_of("memo", model, copies=3),
    "diffusion_tta": lambda model: method_of("diffusion_tta", model, steps=2, draws=3),
}
FIXED, ALONE, ACCUMULATING = {"source", "bn"}, {"memo", "diffusion_tta"}, {"dusa", "dusa_u", "tent"}


def results(*, batch: int = 4, accumulate: int = 1) -> dict[str, dict[str, Any]]:
    """Of one process."""
    return {
        name: found_of(name, batch=batch, accumulate=accumulate)
        for name in METHODS
        if accumulate == 1 or name in ACCUMULATING | FIXED
    }


def of_two() -> dict[str, dict[str, Any]]:
    """Of a process of two, each with half of the images of a step; started as torchrun does."""
    rank = distributed.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    found = {}
    for strategy in ("ddp", "fsdp"):
        keys: dict[str, Any] = {"devices": 2, "share": "images", "strategy": strategy}
        for name in shared(strategy):
            found[f"{strategy}, {name}"] = found_of(name, batch=2, **keys)
        found[f"{strategy}, dusa accumulated"] = found_of("dusa", batch=1, accumulate=2, **keys)
    return found


def shared(strategy: str) -> list[str]:
    """Methods that take other images on every process; sharded weights are no one's own."""
    return [name for name in METHODS if strategy == "ddp" or name not in ALONE]


def found_of(name: str, **keys: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        module, result = adapt_images(METHODS[name], Path(folder), count=COUNT, **keys)
    return {
        "weights": {key: whole(each) for key, each in module.model.named_parameters()},
        "prediction": module.method.predict(Views(image=SEEN["image"], original=SEEN["image"])),
        "names": result.names,
        "loss": result.loss,
        **result.counts.arrays(),
    }


def whole(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else torch.clone(found)
