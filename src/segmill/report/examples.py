"""What the report needs to show one image."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Integer, UInt8


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

    `severity` is 0 where there is none to name. Label and predictions have the image's height and
    width, or one pixel: the class of the whole image.
    """

    image: UInt8[np.ndarray, "_h _w C"]
    label: Integer[np.ndarray, "H W"]
    name: str
    corruption: str
    severity: int
    preds: dict[str, Integer[np.ndarray, "H W"]]

    @property
    def is_of_classes(self) -> bool:
        """Whether one class is said of the whole image."""
        return self.label.size == 1
