"""Random draws of a prediction follow from the image's position, not from what was drawn before.

Networks that draw in every forward pass (Hamburger's bases: SegNeXt, DFormer) so give the same
prediction whatever the order of the images and the number of processes, and on the CPU the same as
the Jittor runtime, whose generator has the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def draws_of(index: int, device: torch.device) -> Iterator[None]:
    """Seed torch by `index`; afterwards its generators go on where they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(index)
        yield
