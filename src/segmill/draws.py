"""Torch's generators during a prediction, for networks that draw (Hamburger's bases)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from segmill.seeds import image_seed


@contextmanager
def draws_of(index: int, device: torch.device) -> Iterator[None]:
    """Draw what belongs to the image at `index`; afterwards the generators go on as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(image_seed(index))
        yield
