"""One image with its label: what every data set yields and every transform takes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

IGNORE = 255


@dataclass(frozen=True)
class Sample:
    """A decoded pair. The label shift has already happened (`label_map`); 255 is ignored.

    `image` is RGB, or RGB and depth as the fourth channel. `label` is None for images without one.
    """

    image: UInt8[np.ndarray, "H W C"]
    label: UInt8[np.ndarray, "H W"] | None
    name: str
