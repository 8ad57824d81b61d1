"""What one of two processes does in tta/test_shared_images.py, and one alone for comparison."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from segmill.models.combined import CombinedModel
from segmill.tta.dusa import Dusa
from segmill.tta.dusa_u import DusaU
from tiny_images import adapt_images
from tiny_methods import method_of

COUNT = 11  # steps of 4, 4 and 3: the last is 2 images for one process and 1 for the other
EVEN = 8


def cotta(model: CombinedModel) -> Any:
    return method_of("cotta", model, ratios=[1.0], flip=False, momentum=0.5, restore=0.3)


METHODS: dict[str, tuple[Callable[[CombinedModel], Any], int]] = {
    "dusa": (lambda model: Dusa(model=model, step="image"), COUNT),
    "dusa_u": (lambda model: DusaU(model=model, step="image"), COUNT),
    "tent": (lambda model: method_of("tent", model), COUNT),
    # These need every step at once: their gradients are averaged after every backward pass.
    "cotta": (cotta, EVEN),
    "sar": (lambda model: method_of("sar", model, entropy_share=1.0, recover_below=0.0), EVEN),
}


def results(*, batch: int = 4, accumulate: int = 1) -> dict[str, dict[str, Any]]:
    """Of one process."""
    return {
        name: _found(name, batch=batch, accumulate=accumulate)
        for name in METHODS
        if accumulate == 1 or name in ("dusa", "dusa_u", "tent")
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
        for name in METHODS:
            found[f"{strategy}, {name}"] = _found(name, batch=2, **keys)
        found[f"{strategy}, dusa accumulated"] = _found("dusa", batch=1, accumulate=2, **keys)
    return found


def _found(name: str, **keys: Any) -> dict[str, Any]:
    method, count = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        module, result = adapt_images(method, Path(folder), count=count, **keys)
    return {
        "weights": {key: whole(each) for key, each in module.model.named_parameters()},
        "names": result.names,
        "loss": result.loss,
        **result.counts.arrays(),
    }


def whole(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else torch.clone(found)
