"""DFormer's transform against its order of operations, recomputed in float64."""

from typing import Any

import cv2
import numpy as np
import pytest

from segmill.data.dformer_transform import DFormerTransform
from segmill.data.sample import Sample
from segmill.data.stream import Transform
from segmill.data.transforms import TrainSample

MEAN, STD = np.array([0.485, 0.456, 0.406, 0.48]), np.array([0.229, 0.224, 0.225, 0.28])
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class Drawn(np.random.RandomState):
    """Draws that are said beforehand: mirrored or not, which factor, how far to the end."""

    def __init__(self, mirror: bool, factor: int, far: float) -> None:
        super().__init__(0)
        self._mirror, self._first, self._far = mirror, factor, far

    def random_sample(self, size=None) -> Any:
        assert size is None
        return 0.5 if self._mirror else 0.49

    def randint(self, *ends: Any, **_: Any) -> Any:
        if len(ends) == 1:
            return self._first
        low, high = ends
        return round(low + self._far * (high - 1 - low))


def sample(height: int = 24, width: int = 36) -> Sample:
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (height, width, 4)).astype(np.uint8)
    return Sample(image, rng.randint(0, 40, (height, width)).astype(np.uint8), "a")


def official(
    given: Sample, crop: tuple[int, int], mirror: bool, factor: float, origin: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Colour and depth apart, normalised before the crop, padded with 0."""
    assert given.label is not None
    planes = [given.image[..., :3], given.image[..., 3], given.label]
    if mirror:
        planes = [np.ascontiguousarray(plane[:, ::-1]) for plane in planes]
    height, width = given.label.shape
    size = (int(width * factor), int(height * factor))
    methods = (cv2.INTER_LINEAR, cv2.INTER_LINEAR, cv2.INTER_NEAREST)
    colour, depth, label = (
        cv2.resize(plane, size, interpolation=method)
        for plane, method in zip(planes, methods, strict=True)
    )
    normal = (np.dstack([colour, depth]).astype(np.float64) / 255 - MEAN) / STD
    (top, left), (bottom, right) = origin, np.add(origin, crop)
    normal, label = normal[top:bottom, left:right], label[top:bottom, left:right]
    missing = np.subtract(crop, label.shape)
    around = [(each // 2, each - each // 2) for each in missing]
    return (
        np.pad(normal, [*around, (0, 0)]),
        np.pad(label, around, constant_values=255),
    )


def normalised(cropped: TrainSample) -> np.ndarray:
    """As Discriminative.normalise does it."""
    inside = np.zeros(cropped.label.shape, bool)
    top, left, bottom, right = cropped.valid
    inside[top:bottom, left:right] = True
    return np.where(inside[..., None], (cropped.image / 255 - MEAN) / STD, 0)


def transform(crop: tuple[int, int], overshoot: int = 1) -> DFormerTransform:
    return DFormerTransform(factors=FACTORS, crop=crop, flip=0.5, overshoot=overshoot)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("far", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("factor", range(6))
@pytest.mark.parametrize("crop", [(24, 36), (20, 50), (33, 21)])  # second: wider than the image
def test_it_is_the_official_order(crop: tuple[int, int], factor: int, far: float, mirror: bool):
    given = sample()
    size = [int(edge * FACTORS[factor]) for edge in (24, 36)]
    origin = [
        round(far * (edge - part + 1)) if edge > part else 0
        for edge, part in zip(size, crop, strict=True)
    ]
    cropped = transform(crop)(given, Drawn(mirror, factor, far))
    image, label = official(given, crop, mirror, FACTORS[factor], (origin[0], origin[1]))
    np.testing.assert_array_equal(cropped.label, label)
    np.testing.assert_array_equal(normalised(cropped), image)
    assert cropped.image.flags.c_contiguous


def test_a_crop_one_past_the_end_is_padded_after_its_rows_and_columns():
    cropped = transform((24, 36))(sample(), Drawn(False, 4, 1.0))
    assert cropped.valid == (0, 0, 23, 35)
    assert (cropped.label[-1] == 255).all()
    assert (cropped.label[:23, :35] != 255).all()


def test_without_overshoot_every_crop_is_full():
    cropped = transform((24, 36), overshoot=0)(sample(), Drawn(False, 4, 1.0))
    assert cropped.valid == (0, 0, 24, 36)


def test_a_small_image_stands_in_the_middle():
    cropped = transform((31, 40))(sample(), Drawn(False, 0, 1.0))
    assert cropped.valid == (9, 11, 21, 29)


def test_draws_follow_the_seed_and_have_the_published_shares():
    given, crop = sample(2, 2), (6, 6)
    make: Transform = transform(crop)
    first, again = (make(given, np.random.RandomState(3)) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    rng = np.random.RandomState(0)
    heights = [(each := make(given, rng).valid)[2] - each[0] for _ in range(600)]
    # 2 x 2 becomes 1, 1, 2, 2, 3, 3 pixels high: a third each, within four deviations.
    assert np.bincount(heights, minlength=4)[1:] == pytest.approx([200] * 3, abs=46)


def test_flip_is_a_share():
    given = sample(4, 4)
    assert given.label is not None
    for share, mirrored in ((0.0, False), (1.0, True)):
        make = DFormerTransform(factors=(1.0,), crop=(4, 4), flip=share, overshoot=1)
        label = make(given, np.random.RandomState(1)).label
        np.testing.assert_array_equal(label, given.label[:, ::-1] if mirrored else given.label)
