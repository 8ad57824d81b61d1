"""The classifier's view equals timm's; the guide's shows the same part of the image."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import create_transform

from segmill.data.files import DataError
from segmill.data.image_view import ImageView


def view(**changes) -> ImageView:
    keys = {"size": 224, "crop_pct": 0.875, "interpolation": "bicubic", "guide_size": 256}
    return ImageView(**{**keys, **changes})


def photograph(height: int, width: int) -> np.ndarray:
    rng = np.random.RandomState(0)
    small = rng.randint(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(300, 401), (375, 300), (500, 333), (224, 300), (120, 96)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.94])
def test_the_classifiers_view_is_timms(size, crop_pct):
    image = photograph(*size)
    transform: Any = create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1)
    )
    theirs = (transform(Image.fromarray(image)).permute(1, 2, 0) * 255).round().byte().numpy()
    np.testing.assert_array_equal(view(crop_pct=crop_pct).classifier(image), theirs)


def test_an_image_of_the_right_size_is_not_touched():
    image = photograph(224, 224)
    assert view().classifier(image) is image


def test_the_guide_sees_the_same_part_of_the_image():
    image = photograph(512, 384)
    large = view(guide_size=224).guide(image).astype(int)
    small = view().classifier(image).astype(int)
    # Resized in one step or cut after resizing: the same part, but for the filter's edges.
    assert np.abs(large - small).mean() < 1


def test_without_a_size_of_its_own_the_guide_gets_the_classifiers_view():
    image = photograph(300, 400)
    one = view(guide_size=None)
    np.testing.assert_array_equal(one.guide(image), one.classifier(image))


def test_without_a_rule_only_images_of_the_right_size_are_taken():
    """The rule is the classifier's; where nobody knows it, it is not guessed."""
    unknown = view(crop_pct=None, interpolation=None)
    assert unknown.classifier(photograph(224, 224)).shape == (224, 224, 3)
    with pytest.raises(DataError, match=r"300 x 400 .* data\.view\.crop_pct=0\.875"):
        unknown.classifier(photograph(300, 400))
