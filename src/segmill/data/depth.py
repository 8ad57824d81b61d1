"""Depth as an image channel: 8 bits, over a stated range or as the file has them."""

import numpy as np
from jaxtyping import Integer, UInt8

from segmill.data.files import DataError


def depth_channel(
    depth: Integer[np.ndarray, "H W"], depth_range: tuple[float, float] | None, where: str
) -> UInt8[np.ndarray, "H W"]:
    """Map `depth_range` (nearest, farthest; in the file's unit) to 0..255 and clip what is outside.

    0 means "not measured" in the file and stays 0. Without a range, 8-bit files are taken as they
    are, whatever 0 means there; `where` names the file in the message about a 16-bit one.
    """
    if depth_range is None:
        if depth.dtype == np.uint8:
            return depth
        raise DataError(
            f"The depth {where} is 16-bit (highest value {int(depth.max())}), but data.depth_range "
            "is null, which takes 8-bit files as they are. Set it to the [nearest, farthest] of "
            "the files, for example [0, 10000] for mm up to 10 m, or convert them to what the "
            "model was trained on."
        )
    nearest, farthest = depth_range
    scaled = np.rint((depth.astype(np.float32) - nearest) * (255 / (farthest - nearest)))
    return np.where(depth == 0, 0, np.clip(scaled, 0, 255)).astype(np.uint8)
