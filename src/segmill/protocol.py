"""How an image becomes a prediction: resize rule, whole or sliding, scales, flip, padding.

A number without its protocol cannot be compared, so `stamp()` goes into every result file.
docs/protocols.md says what each field does to the number. MMSegmentation's chain resizes the bytes
(`inputs`), DFormer's the normalised image on the device (`views`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from segmill.data.transforms import pad, resize_keep_ratio, resize_to_multiple
from segmill.errors import SegmillError
from segmill.metrics import AbsentClass
from segmill.views import View, plan_views

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
    # Defaults: what was always so for those who wrote a stamp before these fields existed.
    follows: Literal["mmseg", "dformer"] = "mmseg"  # whose chain of resizes
    absent_class: AbsentClass = "drop"  # in the means: left out, or counted as 0
    pad_to: Sequence[int] | None = None  # black to the right and below, before normalisation

    def __post_init__(self) -> None:
        for field in ("scale", "window", "stride", "pad_to"):
            object.__setattr__(self, field, _pair(field, getattr(self, field)))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if not self.ratios or min(self.ratios) <= 0:
            raise SegmillError(
                f"protocol.ratios={list(self.ratios)} should be one or more factors above 0, e.g. "
                "protocol.ratios=[1.0] for one scale."
            )
        for field in ("multiple", "pad_divisor"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SegmillError(
                    f"protocol.{field}={value} should be 1 or more, or null for images as they are."
                )
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
        if self.follows == "dformer":
            self._refuse_fields_of_mmsegmentation()
        elif self.pad_to is not None:
            raise SegmillError(
                f"protocol.pad_to={list(self.pad_to)} would have no effect: it is a step of "
                "DFormer's evaluation. Set protocol.follows=dformer, or protocol.pad_to=null; "
                "MMSegmentation's padding is protocol.pad_divisor."
            )

    @property
    def averages_probabilities(self) -> bool:
        """Several views: their probabilities are averaged, instead of one view's logits used."""
        return self.flip or len(self.ratios) > 1

    def inputs(self, image: UInt8[np.ndarray, "H W C"]) -> list[UInt8[np.ndarray, "h w C"]]:
        """Return the resized image, one per ratio; mirroring and padding happen on the device.

        Of DFormer's chain the one image, padded up to `pad_to`: `views` says how it is resized.
        """
        if self.follows == "dformer":
            if self.pad_to is None:
                return [image]
            height, width = image.shape[:2]
            return [pad(image, (max(height, self.pad_to[0]), max(width, self.pad_to[1])))]
        return [self._resized(image, ratio) for ratio in self.ratios]

    @property
    def resizes_on_device(self) -> bool:
        """Whether the network sees other sizes than those of `inputs`."""
        return self.follows == "dformer" and (
            self.multiple is not None or self.mode == "slide" or self.ratios != (1.0,)
        )

    def views(self, size: tuple[int, int]) -> list[View]:
        """How DFormer's chain looks at an image of `size` (padded, if `pad_to` asks for it)."""
        assert self.follows == "dformer", "MMSegmentation's views are made by `inputs`"
        slides = self.mode == "slide"
        return plan_views(
            size,
            ratios=self.ratios,
            multiple=self.multiple,
            window=_pair("window", self.window) if slides else None,
            stride=_pair("stride", self.stride) if slides else None,
        )

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

    def _refuse_fields_of_mmsegmentation(self) -> None:
        """What DFormer's chain never looks at."""
        instead = {
            "scale": (self.scale, "images keep their size; protocol.ratios are factors of it"),
            "pad_divisor": (self.pad_divisor, "protocol.multiple stretches, protocol.pad_to pads"),
            "align_corners": (self.align_corners or None, "each of its resizes has a fixed rule"),
        }
        for field, (value, reason) in instead.items():
            if value is not None:
                null = "false" if value is True else "null"
                value = "true" if value is True else value
                raise SegmillError(
                    f"protocol.{field}={value} would have no effect in DFormer's evaluation "
                    f"(protocol.follows=dformer): {reason}. Set protocol.{field}={null}."
                )

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
