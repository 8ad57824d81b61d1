import numpy as np
import pytest

import golden
from segmill.data.files import DataError
from segmill.data.labels import LabelMap


def test_ranges_shift_and_zero_is_ignored():
    every = np.arange(151, dtype=np.uint8)[None]
    mapped = LabelMap({0: "ignore", "1-150": "0-149"}, num_classes=150)(every, "x.png")
    assert mapped[0, 0] == 255
    np.testing.assert_array_equal(mapped[0, 1:], np.arange(150))


def test_ade20k_map_equals_mmsegmentations_reduce_zero_label():
    case = golden.component("transforms")["reduce_zero_label"]
    ade20k = LabelMap({0: "ignore", "1-150": "0-149", 255: "ignore"}, num_classes=150)
    assert ade20k(np.array(case["inp"], np.uint8), "x.png").tolist() == case["out"]


def test_several_values_may_mean_one_class():
    mapped = LabelMap({0: 1, 5: 1}, num_classes=2)(np.array([[0, 5]], np.uint8), "x.png")
    assert mapped.tolist() == [[1, 1]]


def test_all_values_outside_the_map_are_listed():
    label = np.array([[0, 9, 9, 200]], np.uint8)
    with pytest.raises(DataError, match=r"x\.png .*9 \(2 pixels\), 200 \(1 pixels\)"):
        LabelMap({0: 0}, num_classes=1)(label, "x.png")


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"1-150": "0-148"}, "150 values, but '0-148' has 149 classes"),
        ({"0-5": "0-5"}, "sends 5 to class 5, but the class file has 5 classes"),
        ({0: 0, "0-1": "1-2"}, "mentions the value 0 twice"),
        ({"a": 0}, "the key 'a' is not understood"),
        ({"9-3": 0}, "the key '9-3' is not understood"),
        ({256: 0}, "the key 256 is not understood"),
        ({0: "ignored"}, "the class 'ignored' of 0 is not understood"),
        ({0: -1}, "the class -1 of 0 is not understood"),
    ],
)
def test_unclear_maps_are_refused(label_map, message: str):
    with pytest.raises(DataError, match=message):
        LabelMap(label_map, num_classes=5)


def test_more_classes_than_a_byte_holds_are_refused():
    with pytest.raises(DataError, match="255 classes do not fit"):
        LabelMap({0: 0}, num_classes=255)
