"""Functions run on several processes of this machine, joined by gloo."""

import functools
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def run_processes(function: Callable[[], Any], folder: Path, *, count: int) -> list[Any]:
    """What `function`, a global of some module, returns on each process, in their order."""
    processes = multiprocessing.spawn(
        functools.partial(_process, function, folder, count, sys.path), nprocs=count, join=False
    )
    assert processes is not None
    while not processes.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(
    function: Callable[[], Any], folder: Path, count: int, path: list[str], rank: int
) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),  # a hang is a failure
    )
    torch.save(function(), folder / f"{rank}.pt")
    distributed.destroy_process_group()
