"""DFormer's evaluation against what the official code computed for a toy model (goldens/dformer).

The golden images are normalised already: colour and depth, three channels each.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import golden
from segmill.errors import SegmillError
from segmill.inference import label_of_logits, predict_label, predict_logits
from segmill.metrics import confusion_matrix, scores
from segmill.protocol import Protocol
from segmill.views import View, plan_views, scaled_size
from test_protocol import from_yaml, image, protocol

FOLDER = golden.FOLDER / "dformer"
SCORES: dict[str, Any] = json.loads((FOLDER / "eval_protocol.json").read_text(encoding="utf-8"))
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5)
SCALES = {"multiple": 32, "ratios": RATIOS}
CASES: dict[str, dict[str, Any]] = {
    "ss": {},
    "ms_noflip": SCALES,
    "msf": {**SCALES, "flip": True},
    "msf_slide": {**SCALES, "flip": True, "mode": "slide", "window": (48, 64)},
}
sides = st.integers(16, 800)
ratios = st.sampled_from(RATIOS)


def rule(**changes: Any) -> Protocol:
    return protocol(**{"follows": "dformer", "absent_class": "zero", **changes})


def pairs() -> list[tuple[torch.Tensor, np.ndarray]]:
    """The golden run's images (1, 6, 60, 90) and labels."""
    data, found = np.load(FOLDER / "eval_protocol.npz"), []
    for batch in ("b0", "b1"):
        both = np.concatenate([data[f"{batch}_data"], data[f"{batch}_modal_x"]], axis=1)
        images = torch.from_numpy(both).split(1)
        found += zip(images, data[f"{batch}_label"], strict=True)
    return found


def toy(image: torch.Tensor) -> torch.Tensor:
    data = np.load(FOLDER / "eval_protocol.npz")
    weights = {name: torch.from_numpy(data[f"toy_{name}"]) for name in _TOY}
    colour = F.conv2d(image[:, :3], weights["c.weight"], weights["c.bias"], padding=1)
    return colour + F.conv2d(image[:, 3:], weights["d.weight"], weights["d.bias"], padding=1)


_TOY = ("c.weight", "c.bias", "d.weight", "d.bias")


def percent(values: Any) -> list[float]:
    """As DFormer prints them: two decimals, absent classes 0."""
    return np.round(100 * np.nan_to_num(np.asarray(values)), 2).tolist()


@pytest.mark.parametrize("case", CASES)
def test_every_count_of_the_confusion_matrix_equals_dformers(case):
    total = np.zeros((5, 5), np.int64)
    for inputs, label in pairs():
        pred = predict_label(toy, [inputs], (60, 90), rule(**CASES[case]))
        total += confusion_matrix(label[None], pred.numpy(), 5)
    want = np.load(FOLDER / "eval_protocol.npz")[f"hist_{case}"]
    assert np.array_equal(total, want)
    got = scores(total, absent_class="zero")
    for name, ours in (("miou", "IoU"), ("macc", "Acc"), ("f1", "Fscore")):
        by_class, mean = SCORES[case][name]
        assert percent(got[ours]) == by_class
        assert round(100 * float(got[f"m{ours}"]), 2) == mean


@pytest.mark.parametrize("case", CASES)
def test_the_network_sees_the_sizes_that_dformers_saw(case):
    views, flips = rule(**CASES[case]).views((60, 90)), 1 + ("flip" in CASES[case])
    seen = [[2, 3, *view.window] for view in views for _ in range(flips) for _ in view.corners]
    assert seen == SCORES[case]["shapes_seen_first_image"]


def test_a_class_that_is_absent_counts_as_zero():
    want = SCORES["metric"]
    got = scores(np.array(want["hist"]), absent_class="zero")
    for name, ours in (("iou", "IoU"), ("f1", "Fscore"), ("acc", "Acc")):
        by_class, mean = want[name]
        assert percent(got[ours]) == by_class
        assert round(100 * float(got[f"m{ours}"]), 2) == mean
    assert np.isnan(np.asarray(got["IoU"])[-1]), "a class keeps its NaN; only the means count it"


# Reference: the chain once more, on whole canvases and in the order that the page describes.


def network(stride: int = 8, classes: int = 6) -> nn.Module:
    """Sees its surroundings, so that each window of an image gives something else."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, classes, 1))
    return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), layers).eval().requires_grad_(False)


def picture(height: int, width: int) -> torch.Tensor:
    values = golden.stream("dformer protocol").standard_normal((1, 4, height, width))
    return torch.from_numpy(values.astype(np.float32))


def resize(array: torch.Tensor, size: tuple[int, ...], *, align_corners: bool) -> torch.Tensor:
    return F.interpolate(array, size, mode="bilinear", align_corners=align_corners)


def at_input(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return resize(net(image), tuple(image.shape[-2:]), align_corners=False)


def slid(net: nn.Module, image: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    if image.shape[-2] < window[0] or image.shape[-1] < window[1]:
        image = resize(image, window, align_corners=True)
    total, count = torch.zeros(1, 6, *image.shape[-2:]), torch.zeros(image.shape[-2:])
    starts = []
    for length, side in zip(image.shape[-2:], window, strict=True):
        stride = int(2 / 3 * side)
        grid = max(length - side + stride - 1, 0) // stride + 1
        starts.append([min(step * stride, length - side) for step in range(grid)])
    for top in starts[0]:
        for left in starts[1]:
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            total[area] += at_input(net, image[area])
            count[area] += 1
    return total / count


@pytest.mark.parametrize("window", [None, (48, 64)])
@pytest.mark.parametrize("pad_to", [None, (75, 101)])
def test_the_chain_with_a_coarse_network(window, pad_to):
    net, inputs, size = network(), picture(*(pad_to or (70, 90))), (70, 90)
    sliding = {"mode": "slide", "window": window} if window else {}
    want = torch.zeros(1, 6, *inputs.shape[-2:])
    for ratio in RATIOS:
        new = [int(np.ceil(int(ratio * side) / 32)) * 32 for side in inputs.shape[-2:]]
        scaled = resize(inputs, tuple(new), align_corners=True)
        for mirrored in (False, True):
            view = scaled.flip(3) if mirrored else scaled
            logits = slid(net, view, window) if window else at_input(net, view)
            logits = logits.flip(3) if mirrored else logits
            want += resize(logits, tuple(inputs.shape[-2:]), align_corners=True).softmax(1)
    under = rule(**SCALES, flip=True, pad_to=pad_to, **sliding)
    got = predict_logits(net, [inputs], size, under)
    # Convolutions of one image and of a batch may add in another order.
    torch.testing.assert_close(got, want[..., :70, :90] / 10, atol=1e-6, rtol=0)
    assert torch.equal(predict_label(net, [inputs], size, under), got.argmax(1).byte())


def test_a_single_view_is_the_argmax_at_the_size_of_the_image():
    net, inputs = network(), picture(70, 90)
    want = at_input(net, inputs)
    assert torch.equal(predict_label(net, [inputs], (70, 90), rule()), want.argmax(1).byte())
    assert torch.equal(predict_logits(net, [inputs], (70, 90), rule()), want)


def test_what_was_padded_is_cut_off_and_not_shrunk():
    net, under = network(), rule(pad_to=(80, 100))
    (padded,) = under.inputs(image(70, 90, 4))
    inputs = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    want = at_input(net, inputs)[..., :70, :90].argmax(1).byte()
    assert torch.equal(predict_label(net, [inputs], (70, 90), under), want)
    assert torch.equal(label_of_logits(net(inputs), (80, 100), (70, 90), under), want)


def test_logits_of_an_image_that_was_not_resized_are_refused():
    with pytest.raises(SegmillError, match=r"protocol\.multiple=null"):
        label_of_logits(torch.zeros(1, 6, 9, 12), (70, 90), (70, 90), rule(multiple=32))


# What travels to the device, and the plans.


def test_one_image_travels_whatever_the_scales_are():
    original = image(60, 90, 4)
    (sent,) = rule(**CASES["msf_slide"]).inputs(original)
    assert sent is original


@pytest.mark.parametrize(("size", "want"), [((60, 90), (64, 96)), ((70, 90), (70, 96))])
def test_padding_is_black_to_the_right_and_below_and_never_crops(size, want):
    original = image(size[0], size[1], 4)
    (padded,) = rule(pad_to=(64, 96)).inputs(original)
    assert padded.shape == (*want, 4)
    assert np.array_equal(padded[: size[0], : size[1]], original)
    assert not padded[size[0] :].any()
    assert not padded[:, size[1] :].any()


def test_the_published_sizes_of_nyu():
    sizes = [view.size for view in from_yaml("nyu_ms_flip").views((480, 640))]
    assert sizes == [(256, 320), (384, 480), (480, 640), (608, 800), (736, 960)]
    native = (427, 561)
    assert from_yaml("nyu_ss").views(native) == [View(native, native, native, ((0, 0),))]


def test_a_window_larger_than_one_side_stretches_both():
    (view,) = rule(mode="slide", window=(480, 480)).views((300, 700))
    assert (view.size, view.canvas, view.corners) == ((300, 700), (480, 480), ((0, 0),))


@given(sides, sides, ratios, st.sampled_from([1, 8, 32]))
def test_a_scaled_side_is_the_next_multiple_of_the_scaled_length(height, width, ratio, multiple):
    size = scaled_size((height, width), ratio, multiple)
    for side, length in zip(size, (height, width), strict=True):
        assert side % multiple == 0
        assert 0 <= side - int(length * ratio) < multiple


@given(sides, sides, ratios, st.integers(24, 500), st.integers(24, 500))
def test_windows_cover_the_canvas_and_stay_inside(height, width, ratio, rows, columns):
    window, stride = (rows, columns), (2 * rows // 3, 2 * columns // 3)
    planning = {"ratios": (ratio,), "multiple": 32, "window": window, "stride": stride}
    (view,) = plan_views((height, width), **planning)
    stretched = view.size[0] < rows or view.size[1] < columns
    assert view.canvas == (window if stretched else view.size)
    assert view.window == window
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in view.corners})
        assert starts[0] == 0
        assert starts[-1] + window[axis] == view.canvas[axis], "the last one is shifted back inside"
        assert (np.diff(starts) <= stride[axis]).all()


@given(sides, sides)
def test_without_a_window_the_canvas_is_the_one_window(height, width):
    planning = {"ratios": RATIOS, "multiple": 32, "window": None, "stride": None}
    for view in plan_views((height, width), **planning):
        assert view.size == view.canvas == view.window
        assert view.corners == ((0, 0),)


# Fields.


@pytest.mark.parametrize("name", ["nyu_ss", "nyu_ms_flip", "sun_ms_flip_slide"])
def test_the_named_protocols_are_dformers(name):
    built = from_yaml(name)
    assert (built.follows, built.absent_class) == ("dformer", "zero")


def test_sun_slides_by_two_thirds_of_the_crop():
    built = from_yaml("sun_ms_flip_slide")
    assert (built.mode, built.window, built.stride) == ("slide", (512, 512), (341, 341))


def test_a_stamp_from_before_these_fields_means_mmsegmentations_chain():
    new = protocol().stamp()
    old = {key: new[key] for key in new if key not in ("follows", "absent_class", "pad_to")}
    assert Protocol.from_stamp(old) == protocol(follows="mmseg", absent_class="drop", pad_to=None)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("scale", (640, 480), r"protocol\.scale=null"),
        ("pad_divisor", 32, r"protocol\.pad_divisor=null"),
        ("align_corners", True, r"protocol\.align_corners=false"),
    ],
)
def test_a_field_that_dformers_chain_never_reads_is_refused(field, value, remedy):
    with pytest.raises(SegmillError, match=remedy):
        rule(**{field: value})


def test_padding_the_bytes_is_refused_in_mmsegmentations_chain():
    with pytest.raises(SegmillError, match=r"protocol\.follows=dformer"):
        protocol(pad_to=(531, 730))


def test_pad_to_is_a_height_and_a_width():
    with pytest.raises(SegmillError, match=r"protocol\.pad_to=\[531\] should be two"):
        rule(pad_to=(531,))
