"""Loaders with forked workers, and images as tensors: what the data modules share."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, distributed
from torch.utils.data import DataLoader


def forked_loader(dataset: Any, collate: Callable, *, workers: int, **order: Any) -> DataLoader:
    """A DataLoader whose workers share what the process has decoded; `order` goes to torch."""
    forked = workers > 0
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if forked else None,
        persistent_workers=forked,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def unchanged(item: dict[str, Any]) -> dict[str, Any]:
    """The collate function of loaders without batches."""
    return item


def channels_first(image: UInt8[np.ndarray, "H W C"]) -> UInt8[Tensor, "1 C H W"]:
    """An image as a batch of one."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[None]))


def place_of_process() -> tuple[int, int]:
    """(rank, world size) of this process at this moment."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _start_worker(_: int) -> None:
    # OpenCV's own threads do not survive a fork, and the workers already fill the cores.
    cv2.setNumThreads(0)
