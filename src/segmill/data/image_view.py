"""ImageView: from a decoded image to what a classifier and a guide see, by one published rule.

Follows: timm's evaluation transform with a centre crop (`timm.data.create_transform`): the short
side becomes floor(size / crop_pct), then the middle is cut out; Pillow resizes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from segmill.data.files import DataError

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """Sizes in pixels. An image that has the classifier's size already is taken as it is.

    `crop_pct` (the share of the short side that is kept) and `interpolation` may be null where no
    image is of another size: `segmill adapt` fills in what timm says of the classifier.
    `guide_size` is the side of what the guide gets: the same part of the image, made of its
    original pixels; null gives it the classifier's view.
    """

    size: int
    crop_pct: float | None
    interpolation: Literal["bicubic", "bilinear"] | None
    guide_size: int | None

    def __post_init__(self) -> None:
        share = 1.0 if self.crop_pct is None else self.crop_pct
        if self.size < 1 or (self.guide_size or 1) < 1 or not 0 < share <= 1:
            raise DataError(
                f"data.view.size={self.size}, data.view.guide_size={self.guide_size}, "
                f"data.view.crop_pct={self.crop_pct}: sizes are above 0, and crop_pct is the share "
                "of the short side that is kept, above 0 and at most 1."
            )

    def classifier(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
        """What the classifier sees."""
        height, width = image.shape[:2]
        if height == width == self.size:
            return image
        top, left, resized = self._layout(height, width)
        assert self.interpolation is not None  # _layout has refused it
        picture = Image.fromarray(image).resize(resized, _FILTERS[self.interpolation])
        return np.array(picture)[top : top + self.size, left : left + self.size]

    def guide(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "G G 3"]:
        """What the guide resizes for itself."""
        if self.guide_size is None:
            return self.classifier(image)
        side = (self.guide_size, self.guide_size)
        box = self._box(*image.shape[:2])
        picture = Image.fromarray(image).resize(side, Image.Resampling.BICUBIC, box=box)
        return np.array(picture)

    def _layout(self, height: int, width: int) -> tuple[int, int, tuple[int, int]]:
        """First row and column of the crop, and (width, height) of what it is cut from."""
        if self.crop_pct is None or self.interpolation is None:
            raise DataError(
                f"An image is {height} x {width} and the classifier takes {self.size} x "
                f"{self.size}, but data.view.crop_pct or data.view.interpolation is null, and timm "
                "has no data config of this model that would say them. Set both as in its "
                "training, for example data.view.crop_pct=0.875 data.view.interpolation=bicubic."
            )
        short = math.floor(self.size / self.crop_pct)
        if height <= width:
            rows, columns = short, short * width // height
        else:
            rows, columns = short * height // width, short
        # torchvision's CenterCrop rounds half to even, as Python does.
        top, left = round((rows - self.size) / 2), round((columns - self.size) / 2)
        return top, left, (columns, rows)

    def _box(self, height: int, width: int) -> Box:
        """The classifier's part in the image's own pixels: left, top, right, bottom."""
        if height == width == self.size:
            return 0.0, 0.0, float(width), float(height)
        top, left, (columns, rows) = self._layout(height, width)
        across, down = width / columns, height / rows
        right, bottom = (left + self.size) * across, (top + self.size) * down
        return left * across, top * down, min(right, width), min(bottom, height)
