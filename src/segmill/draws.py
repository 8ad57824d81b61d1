"""Torch's generators: during a prediction or a step, for networks that draw (Hamburger's bases),
and of each image of a batch, so that its draws do not depend on the others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from segmill.seeds import image_seed

# One for all rows of a draw, or one for each image, whose rows lie side by side.
Generators = torch.Generator | Sequence[torch.Generator]


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


def drawn(
    draw: Callable[[int, torch.Generator], Tensor], count: int, generators: Generators
) -> Tensor:
    """`count` rows by `draw(rows, generator)`; several generators draw equal parts of them."""
    if isinstance(generators, torch.Generator):
        return draw(count, generators)
    assert count % len(generators) == 0, "every image has as many rows"
    return torch.cat([draw(count // len(generators), each) for each in generators])
