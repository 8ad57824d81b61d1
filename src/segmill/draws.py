"""Torch's generators during a prediction or a step, for networks that draw (Hamburger's bases)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from segmill.seeds import image_seed


@contextmanager
def draws_of(index: int, device: torch.device) -> Iterator[None]:
    """Draw what belongs to the image at `index`; afterwards the generators go on as before."""
    with draws_from(image_seed(index), device):
        yield


@contextmanager
def draws_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` on, on the CPU and on `device`; afterwards all goes on as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
