import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import golden
from segmill.inference import predict_label, predict_logits, slide_logits, to_original
from test_protocol import protocol

SLIDE = {"mode": "slide", "window": (32, 40), "stride": (21, 26)}
WINDOWS = {"mode": "slide", "window": (256, 256), "stride": (170, 170)}


def network(classes: int = 7, stride: int = 4) -> nn.Module:
    """Sees its surroundings, so that each window of an image gives something else."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, classes, 1))
    return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), layers).eval().requires_grad_(False)


def picture(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(golden.golden_image(height, width))


def resize(logits: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def slide_as_published(net, image, window, stride, align_corners=False) -> torch.Tensor:
    """Whole-canvas accumulation, window by window."""
    height, width = image.shape[-2:]
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    total, count = 0, 0
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride[0] + window[0], height)
            right = min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            crop = image[..., top:bottom, left:right]
            logits = resize(net(crop), crop.shape[-2:], align_corners)
            edges = (left, width - right, top, height - bottom)
            total = total + F.pad(logits, edges)
            count = count + F.pad(torch.ones_like(logits[:, :1]), edges)
    return total / count


@pytest.mark.parametrize("case", ["plain", "pad", "img_pad"])
def test_post_processing_equals_mmsegmentation(case):
    meta = golden.component("post")[case]["meta"]
    data = np.load(golden.FOLDER / "mmseg/components/postprocess.npz")
    logits = torch.from_numpy(golden.postprocessing_logits())
    image = torch.zeros(1, 3, *meta["img_shape"])
    rule, size = protocol(pad_divisor=8), tuple(meta["ori_shape"])
    got = predict_logits(lambda _: logits, [image], size, rule)
    np.testing.assert_array_equal(got[0].numpy(), data[f"{case}/logits"])
    pred = predict_label(lambda _: logits, [image], size, rule)
    np.testing.assert_array_equal(pred[0].numpy(), data[f"{case}/argmax"])


def test_mirroring_back_equals_mmsegmentation():
    meta = golden.component("post")["flip_h"]["meta"]
    want = np.load(golden.FOLDER / "mmseg/components/postprocess.npz")["flip_h/logits"]
    got = to_original(
        torch.from_numpy(golden.postprocessing_logits()),
        content=tuple(meta["img_shape"]),
        mirrored=True,
        size=tuple(meta["ori_shape"]),
        align_corners=False,
    )
    np.testing.assert_array_equal(got[0].numpy(), want)


@pytest.mark.parametrize("align_corners", [False, True])
def test_whole_is_two_resizes_and_not_one(align_corners):
    net, image, size = network(), picture(64, 80), (50, 70)
    rule = protocol(align_corners=align_corners)
    chain = resize(resize(net(image), (64, 80), align_corners), size, align_corners)
    assert torch.equal(predict_logits(net, [image], size, rule), chain)
    assert torch.equal(predict_label(net, [image], size, rule), chain.argmax(1).byte())
    once = resize(net(image), size, align_corners)
    assert not torch.equal(once.argmax(1), chain.argmax(1))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", [2, 7, 150])
def test_the_fused_label_at_input_size_is_the_argmax_of_the_resize(classes, align_corners):
    net, image = network(classes), picture(64, 80)
    pred = predict_label(net, [image], (64, 80), protocol(align_corners=align_corners))
    assert torch.equal(pred, resize(net(image), (64, 80), align_corners).argmax(1).byte())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(32, 40), (64, 80), (75, 93), (20, 93), (75, 30), (20, 30)])
@pytest.mark.parametrize("batch", [1, 8])
def test_sliding_equals_the_published_loop(size, align_corners, batch):
    net, image = network(), picture(*size)
    window, stride = SLIDE["window"], SLIDE["stride"]
    got = slide_logits(
        net, image, window=window, stride=stride, batch=batch, align_corners=align_corners
    )
    want = slide_as_published(net, image, window, stride, align_corners)
    # Convolutions of one image and of a batch may add in another order; the rest is the same.
    torch.testing.assert_close(got, want, atol=0 if batch == 1 else 1e-6, rtol=0)


@pytest.mark.parametrize("size", [(75, 93), (60, 110)])
def test_a_sliding_label_is_the_argmax_of_its_logits(size):
    net, image, rule = network(), picture(75, 93), protocol(**SLIDE)
    logits = predict_logits(net, [image], size, rule)
    want = slide_as_published(net, image, SLIDE["window"], SLIDE["stride"])
    torch.testing.assert_close(logits, resize(want, size, False), atol=1e-6, rtol=0)
    assert torch.equal(predict_label(net, [image], size, rule), logits.argmax(1).byte())


@pytest.mark.parametrize("mode", [{}, SLIDE])
def test_scales_and_mirrors_average_probabilities_at_the_original_size(mode):
    net, size = network(), (64, 80)
    images, rule = (
        [picture(48, 60), picture(96, 120)],
        protocol(ratios=(0.75, 1.5), flip=True, pad_divisor=32, **mode),
    )
    want = 0
    for image in images:
        for mirrored in (False, True):
            view = image.flip(3) if mirrored else image  # mirrored first, padded then
            height, width = view.shape[-2:]
            padded = F.pad(view, (0, -width % 32, 0, -height % 32))
            logits = (
                slide_as_published(net, padded, SLIDE["window"], SLIDE["stride"])
                if mode
                else resize(net(padded), padded.shape[-2:], False)
            )[..., :height, :width]
            logits = logits.flip(3) if mirrored else logits
            want = want + resize(logits, size, False).softmax(1)
    got = predict_logits(net, images, size, rule)
    torch.testing.assert_close(got, want / 4, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.sum(1), torch.ones(1, *size))
    assert torch.equal(predict_label(net, images, size, rule), got.argmax(1).byte())


def test_equal_logits_go_to_the_lower_class():
    image = torch.zeros(1, 3, 20, 20)
    pred = predict_label(lambda _: torch.zeros(1, 40, 5, 5), [image], (30, 30), protocol())
    assert (pred == 0).all()


def test_more_than_256_classes_need_more_than_a_byte():
    logits = torch.zeros(1, 300, 5, 5)
    logits[:, 299] = 1
    for size in ((20, 20), (30, 30)):
        pred = predict_label(lambda _: logits, [torch.zeros(1, 3, 20, 20)], size, protocol())
        assert pred.dtype == torch.int64
        assert (pred == 299).all()


def test_half_precision_logits_are_compared_in_float32():
    logits = network()(picture(64, 80)).bfloat16()
    pred = predict_label(lambda _: logits, [picture(64, 80)], (50, 70), protocol())
    chain = resize(resize(logits.float(), (64, 80), False), (50, 70), False)
    assert torch.equal(pred, chain.argmax(1).byte())


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("mode", [{}, WINDOWS])
def test_full_size_logits_of_all_classes_never_exist(mode):
    image, size = torch.zeros(1, 3, 512, 512), (600, 600)
    net = nn.Conv2d(3, 150, 8, stride=8).requires_grad_(False)
    with _Largest() as largest:
        predict_label(net, [image], size, protocol(**mode))
    assert largest.elements < 150 * 512 * 512 / 20


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [{}, WINDOWS])
@pytest.mark.parametrize("size", [(512, 512), (600, 450)])
def test_labels_on_the_device_are_the_argmax_of_the_chain(mode, size):
    net, image = network(150).cuda(), picture(512, 512).cuda()
    rule = protocol(**mode)
    pred = predict_label(net, [image], size, rule)
    logits = predict_logits(net, [image], size, rule)
    # Ties may be settled differently by another order of additions in the fused kernel.
    assert (pred != logits.argmax(1)).float().mean() < 1e-5
