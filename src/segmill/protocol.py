"""How an image becomes a prediction: resize rule, whole or sliding, scales, flip, padding.

A number without its protocol cannot be compared, so `stamp()` goes into every result file.
docs/protocols.md says what each field does to the number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from segmill.data.transforms import resize_keep_ratio, resize_to_multiple
from segmill.errors import SegmillError

# Raised whenever the same fields would give another number.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Evaluation protocol. Sizes are (height, width), except `scale`, which is (long, short)."""

    name: str
    scale: Sequence[int] | None  # fit the image into (long edge, short edge); None = native size
    multiple: int | None  # stretch both sides up to a multiple (PoolFormer: 32)
    mode: Literal["whole", "slide"]
    window: Sequence[int] | None
    stride: Sequence[int] | None  # None = two thirds of the window, rounded down
    ratios: Sequence[float]  # factors of the original image; (1.0,) = one scale
    flip: bool  # also predict the mirrored image
    pad_divisor: int | None  # zeros to the right and below, after normalisation
    align_corners: bool
    ignore_index: int

    def __post_init__(self) -> None:
        for field in ("scale", "window", "stride"):
            object.__setattr__(self, field, _pair(field, getattr(self, field)))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if self.mode == "slide":
            if self.window is None:
                raise SegmillError(
                    "protocol.mode=slide needs protocol.window, e.g. protocol.window=[512,512]."
                )
            if self.stride is None:
                object.__setattr__(self, "stride", tuple(side * 2 // 3 for side in self.window))
            elif self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
                raise SegmillError(
                    f"protocol.stride={list(self.stride)} is larger than "
                    f"protocol.window={list(self.window)}: pixels between windows would have no "
                    "prediction. Make it smaller, or null for two thirds of the window."
                )
        if self.scale is not None and self.ratios != (1.0,):
            raise SegmillError(
                f"protocol.ratios={list(self.ratios)} are factors of the original image, so "
                f"protocol.scale={list(self.scale)} would have no effect. "
                "Set protocol.scale=null or protocol.ratios=[1.0]."
            )

    @property
    def averages_probabilities(self) -> bool:
        """Several views: their probabilities are averaged, instead of one view's logits used."""
        return self.flip or len(self.ratios) > 1

    def inputs(self, image: UInt8[np.ndarray, "H W C"]) -> list[UInt8[np.ndarray, "h w C"]]:
        """Return the resized image, one per ratio; mirroring and padding happen on the device."""
        return [self._resized(image, ratio) for ratio in self.ratios]

    @classmethod
    def from_stamp(cls, stamp: Mapping[str, Any]) -> "Protocol":
        """Return the protocol that wrote `stamp`."""
        if stamp["version"] != VERSION:
            raise SegmillError(
                f"This protocol was written by version {stamp['version']} of the rules, here they "
                f"are at {VERSION}; the numbers would differ. Name a protocol: protocol=whole."
            )
        return cls(**{name: value for name, value in stamp.items() if name != "version"})

    def stamp(self) -> dict[str, Any]:
        """Return everything that decides the number, as JSON-able values."""
        return {"version": VERSION, **asdict(self)}

    def _resized(self, image: np.ndarray, ratio: float) -> np.ndarray:
        height, width = image.shape[:2]
        if ratio != 1.0:
            # MMCV rounds the scaled size and then fits the image into it, ratio kept: the size
            # can differ by a pixel from rounding once.
            target = int(height * ratio + 0.5), int(width * ratio + 0.5)
            image = resize_keep_ratio(image, (max(target), min(target)))
        if self.scale is not None:
            image = resize_keep_ratio(image, self.scale)
        return image if self.multiple is None else resize_to_multiple(image, self.multiple)


def _pair(field: str, value: Sequence[int] | None) -> tuple[int, int] | None:
    """Make a tuple, as YAML has only lists."""
    if value is None:
        return None
    if len(value) != 2 or min(value) < 1:
        raise SegmillError(
            f"protocol.{field}={list(value)} should be two positive numbers of pixels, e.g. "
            f"protocol.{field}=[512,512]."
        )
    return value[0], value[1]
