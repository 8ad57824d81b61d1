import json

import numpy as np
import pytest
from omegaconf import OmegaConf

import golden
from segmill.errors import SegmillError
from segmill.paths import CONFIGS
from segmill.protocol import Protocol

NAMES = ["whole", "slide", "ms_flip", "nyu_ss", "nyu_ms_flip", "sun_ms_flip_slide"]
DATA = {"data": {"test_scale": [2048, 512], "crop": [512, 512]}}


def protocol(**changes) -> Protocol:
    fields = {
        "name": "test",
        "scale": None,
        "multiple": None,
        "mode": "whole",
        "window": None,
        "stride": None,
        "ratios": (1.0,),
        "flip": False,
        "pad_divisor": None,
        "align_corners": False,
        "ignore_index": 255,
    }
    return Protocol(**{**fields, **changes})


def from_yaml(name: str) -> Protocol:
    tree = OmegaConf.merge(DATA, {"protocol": OmegaConf.load(CONFIGS / f"protocol/{name}.yaml")})
    fields = OmegaConf.to_container(tree.protocol, resolve=True)
    assert fields.pop("_target_") == "segmill.protocol.Protocol"
    return Protocol(**fields)


def image(height: int, width: int, channels: int = 3) -> np.ndarray:
    return golden.stream("protocol").integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_builds_and_is_named_like_itself(name):
    built = from_yaml(name)
    assert built.name == name
    assert json.loads(json.dumps(built.stamp()))["name"] == name


def test_slide_takes_the_training_crop_and_two_thirds_of_it():
    assert (from_yaml("slide").window, from_yaml("slide").stride) == ((512, 512), (341, 341))


def test_the_native_image_is_not_copied():
    original = image(60, 90)
    assert protocol().inputs(original)[0] is original


@pytest.mark.parametrize(
    ("size", "want"),
    [((512, 683), (512, 683)), ((300, 400), (512, 683)), ((256, 1500), (350, 2048))],
)
def test_test_scale_fits_the_image_into_long_and_short_edge(size, want):
    (resized,) = protocol(scale=(2048, 512)).inputs(image(*size))
    assert resized.shape[:2] == want


def test_ratios_are_factors_of_the_original_image():
    shapes = [view.shape[:2] for view in from_yaml("ms_flip").inputs(image(101, 151))]
    # MMCV rounds (126, 189), then fits the image into it with its ratio kept: (126, 188).
    assert shapes == [(51, 76), (76, 113), (101, 151), (126, 188), (152, 227), (177, 264)]


def test_both_sides_become_multiples_when_asked():
    (resized,) = protocol(scale=(2048, 96), multiple=32).inputs(image(101, 151))
    assert resized.shape[:2] == (96, 160)


def test_depth_rides_along_without_changing_the_colours():
    rgbd, rule = image(40, 60, 4), protocol(scale=(90, 80))
    (both,), (colour,) = rule.inputs(rgbd), rule.inputs(rgbd[..., :3].copy())
    assert both.shape == (60, 90, 4)
    assert np.array_equal(both[..., :3], colour)


@pytest.mark.parametrize("name", NAMES)
def test_a_stamp_that_went_through_json_gives_the_protocol_back(name):
    built = from_yaml(name)
    assert Protocol.from_stamp(json.loads(json.dumps(built.stamp()))) == built


def test_a_stamp_of_other_rules_is_refused():
    with pytest.raises(SegmillError, match="protocol=whole"):
        Protocol.from_stamp({**protocol().stamp(), "version": 0})


def test_a_window_of_one_number_is_refused():
    with pytest.raises(SegmillError, match=r"protocol\.window=\[512\] should be two"):
        protocol(mode="slide", window=(512,))


def test_the_stamp_tells_two_protocols_apart():
    assert protocol(flip=True).stamp() != protocol(flip=False).stamp()


def test_a_scale_that_ratios_would_override_is_refused():
    with pytest.raises(SegmillError, match=r"protocol\.scale=null"):
        protocol(scale=(2048, 512), ratios=(0.5, 1.0))


def test_slide_without_a_window_is_refused():
    with pytest.raises(SegmillError, match=r"protocol\.window"):
        protocol(mode="slide")


def test_a_stride_that_leaves_gaps_is_refused():
    with pytest.raises(SegmillError, match="pixels between windows"):
        protocol(mode="slide", window=(64, 64), stride=(64, 65))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ratios": []}, r"protocol\.ratios=\[\]"),
        ({"ratios": [1.0, 0.0]}, r"protocol\.ratios=\[1\.0, 0\.0\]"),
        ({"multiple": 0}, r"protocol\.multiple=0"),
        ({"pad_divisor": -32}, r"protocol\.pad_divisor=-32"),
    ],
)
def test_sizes_of_nothing_are_refused(change, named):
    with pytest.raises(SegmillError, match=named):
        protocol(**change)
