"""Seeds of random draws: a training step's follow from its number, a prediction's from the image's.

So a run that goes on draws what it would have drawn, the number of processes changes no score, and
the runtimes, whose generators on the CPU have the same numbers, draw alike.
"""

import numpy as np


def step_seed(seed: int, batch: int, rank: int) -> int:
    """Seed of what the network draws for the `batch`-th micro-batch of a process."""
    return int(np.random.SeedSequence([seed, batch, rank]).generate_state(1)[0])


def image_seed(index: int) -> int:
    """Seed of what the network draws for the image at `index` of a split."""
    return index
