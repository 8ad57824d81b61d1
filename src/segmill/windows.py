"""Where sliding windows start. The same rule serves every protocol, runtime and guide."""

import numpy as np
from jaxtyping import Int


def window_starts(length: int, window: int, stride: int) -> Int[np.ndarray, " N"]:
    """Starts of the fewest windows at `stride` that cover `length` pixels.

    The last window is shifted back inside, so windows overlap rather than overhang
    (MMSegmentation's rule). A window longer than `length` starts at 0 and is cut by the caller.
    """
    if min(length, window, stride) < 1:
        raise ValueError(
            f"Windows need positive sizes, got length {length}, window {window}, stride {stride}."
        )
    last = max(length - window, 0)
    count = -(-last // stride) + 1
    return np.minimum(np.arange(count) * stride, last)
