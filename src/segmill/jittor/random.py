"""The random stream of the Jittor runtime: bases, dropout, drop path and initial weights.

One stream for the whole process, so that a training state holds one position and a run resumes bit
for bit. After `seed(n)` its uniform numbers are those of torch's on the CPU after
`torch.manual_seed(n)`: the Mersenne Twister's lower 24 bits.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from scipy.special import ndtri

BITS = 24  # of a float32's significand
_generator = np.random.RandomState(0)


def seed(value: int) -> None:
    """Start the stream of that number."""
    _generator.seed(value)


def uniform(shape: Sequence[int]) -> Float32[np.ndarray, "..."]:
    """Numbers in [0, 1)."""
    draws = _generator.randint(0, 2**32, tuple(shape), dtype=np.uint32)
    return (draws & (2**BITS - 1)).astype(np.float32) / np.float32(2**BITS)


def normal(shape: Sequence[int]) -> Float32[np.ndarray, "..."]:
    """Standard normal numbers, each from one of `uniform`."""
    middle = uniform(shape).astype(np.float64) + 0.5**BITS / 2  # never 0 or 1
    return ndtri(middle).astype(np.float32)


def state() -> dict[str, np.ndarray]:
    """Where the stream stands: `key` (624 numbers) and `position` (one)."""
    _name, key, position, *_gauss = _generator.get_state(legacy=True)
    return {"key": np.array(key, np.uint32), "position": np.array(position, np.int64)}


def set_state(value: dict[str, np.ndarray]) -> None:
    """Continue where `state` was asked for."""
    _generator.set_state(("MT19937", value["key"], int(value["position"]), 0, 0.0))
