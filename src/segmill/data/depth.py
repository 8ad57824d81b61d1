"""Depth as an image channel: 8 bits over a stated range."""

import numpy as np
from jaxtyping import Integer, UInt8


def depth_channel(
    depth: Integer[np.ndarray, "H W"], depth_range: tuple[float, float]
) -> UInt8[np.ndarray, "H W"]:
    """Map `depth_range` (nearest, farthest; in the file's unit) to 0..255 and clip what is outside.

    0 means "not measured" in the file and stays 0.
    """
    nearest, farthest = depth_range
    scaled = np.rint((depth.astype(np.float32) - nearest) * (255 / (farthest - nearest)))
    return np.where(depth == 0, 0, np.clip(scaled, 0, 255)).astype(np.uint8)
