"""One image with one label: what data sets of classification yield."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from segmill.data.sample import Sample

NO_LABEL = -1  # 255, what segmentation ignores, is a class of ImageNet


@dataclass(frozen=True)
class LabelledImage:
    """A decoded RGB image and its class, counted from 0; `NO_LABEL` is not counted."""

    image: UInt8[np.ndarray, "H W 3"]
    label: int
    name: str


@runtime_checkable
class LabelledImages(Protocol):
    """A list of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LabelledImage: ...

    def name(self, index: int) -> str:
        """What the image is called, without decoding it."""
        ...


class LabelMaps:
    """The same images as samples of segmentation whose pixels all have the image's label.

    What predicts and draws maps then shows a classifier too. For fewer than 255 classes.
    """

    def __init__(self, images: LabelledImages) -> None:
        self._images = images
        self.names = np.array([images.name(index).encode() for index in range(len(images))])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """One image with its map."""
        found = self._images[index]
        label = np.full(found.image.shape[:2], found.label, np.uint8)
        return Sample(found.image, label, found.name)
