"""What the report needs to show one image."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class Example:
    """One evaluated image. `pred` has the label's size; `others` are predictions to compare with.

    A fourth channel of the image is shown as depth. `miou` is that of this image alone.
    """

    image: UInt8[np.ndarray, "H W C"]
    label: UInt8[np.ndarray, "H W"]
    pred: UInt8[np.ndarray, "H W"]
    name: str
    miou: float
    others: dict[str, UInt8[np.ndarray, "H W"]] = field(default_factory=dict)


@dataclass(frozen=True)
class BeforeAfter:
    """One corrupted image and what each method says of it, by the method's name.

    `severity` is 0 where there is none to name. All arrays have one height and width.
    """

    image: UInt8[np.ndarray, "H W C"]
    label: UInt8[np.ndarray, "H W"]
    name: str
    corruption: str
    severity: int
    preds: dict[str, UInt8[np.ndarray, "H W"]]
