"""DFormer's training transform: mirror, one of a few sizes, crop, centred padding.

Follows the official code in order, sizes, interpolation and distribution of the draws, which come
from another generator. It normalises before it crops; here that happens on the device, with the
same numbers, and `valid` marks the padding that is 0 afterwards.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from segmill.data.sample import IGNORE, Sample
from segmill.data.transforms import NO_JITTER, Image, TrainSample, resize


class DFormerTransform:
    """`flip` is the share of mirrored samples, `factors` the scales, each as likely.

    A crop may start up to `overshoot` pixels past the last origin at which it is full; the
    official code has 1, because the upper end of its draw is inclusive. Such a crop, like a small
    image, is padded on both sides, by one pixel less before it where the number is odd.
    """

    def __init__(
        self,
        *,
        factors: Sequence[float],
        crop: tuple[int, int],
        flip: float,
        overshoot: int,
    ) -> None:
        self.factors, self.crop, self.flip, self.overshoot = factors, crop, flip, overshoot

    def __call__(self, sample: Sample, rng: np.random.RandomState) -> TrainSample:
        """Crop one labelled sample; depth is scaled like colour."""
        image, label = sample.image, sample.label
        assert label is not None
        if rng.random_sample() >= 1 - self.flip:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        factor = self.factors[rng.randint(len(self.factors))]
        height, width = label.shape
        size = (int(height * factor), int(width * factor))
        top, left = self._origin(size[0], 0, rng), self._origin(size[1], 1, rng)
        rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
        image, valid = centred(resize(image, size)[rows, columns], self.crop)
        label, _ = centred(resize(label, size)[rows, columns], self.crop)
        return TrainSample(image, label, valid, NO_JITTER, sample.name)

    def _origin(self, length: int, axis: int, rng: np.random.RandomState) -> int:
        """Where the crop starts; 0, without a draw, in an image that is no longer than the crop."""
        left_over = length - self.crop[axis]
        return int(rng.randint(0, left_over + self.overshoot + 1)) if left_over > 0 else 0


def centred(array: Image, size: tuple[int, int]) -> tuple[Image, tuple[int, int, int, int]]:
    """Pad to (height, width), images by 0, labels by 255; and the box that the array then covers.

    A box is (top, left, bottom, right): (0, 1, 1, 2) for 1 x 1 in 2 x 3.
    """
    height, width = array.shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    valid = (top, left, top + height, left + width)
    if (height, width) == size:
        return np.ascontiguousarray(array), valid
    padded = np.full((*size, *array.shape[2:]), IGNORE if array.ndim == 2 else 0, np.uint8)
    padded[top : valid[2], left : valid[3]] = array
    return padded, valid
