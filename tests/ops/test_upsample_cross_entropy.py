"""The fused loss against torch's own chain: interpolate, then cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from golden import component, loss_inputs
from segmill.errors import SegmillError
from segmill.ops import upsample_cross_entropy as module
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy

SIZES = [
    ((5, 7), (17, 23)),
    ((4, 4), (16, 16)),
    ((6, 5), (6, 5)),
    ((9, 8), (4, 5)),
    ((1, 3), (7, 3)),
]


def _inputs(
    small: tuple[int, int], large: tuple[int, int], num_classes: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_classes, *small, generator=draw, dtype=torch.float64)
    label = torch.randint(0, num_classes, (2, *large), generator=draw)
    label[torch.rand(label.shape, generator=draw) < 0.2] = 255
    weight = torch.rand(num_classes, generator=draw, dtype=torch.float64) + 0.5
    return logits.requires_grad_(), label, weight


def _eager(logits, label, weight, smoothing, align_corners):
    large = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(
        large, label, weight, ignore_index=255, label_smoothing=smoothing, reduction="mean"
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_equal_torch(sizes, align_corners, smoothing, weighted, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 300)  # several chunks, the last one shorter
    logits, label, weight = _inputs(*sizes)
    class_weight = weight if weighted else None
    expected = _eager(logits, label, class_weight, smoothing, align_corners)
    loss = upsample_cross_entropy(
        logits,
        label,
        align_corners=align_corners,
        class_weight=class_weight,
        label_smoothing=smoothing,
        average="valid",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_gradient_passes_gradcheck(align_corners, average):
    logits, label, weight = _inputs((3, 4), (8, 9), num_classes=4)

    def loss(logits):
        return upsample_cross_entropy(
            logits,
            label,
            align_corners=align_corners,
            class_weight=weight,
            label_smoothing=0.2,
            average=average,
        )

    assert torch.autograd.gradcheck(loss, logits)


def test_default_average_divides_by_ignored_pixels_too():
    logits, label, _ = _inputs((4, 4), (8, 8))
    total = F.cross_entropy(
        F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False),
        label,
        ignore_index=255,
        reduction="sum",
    )
    torch.testing.assert_close(upsample_cross_entropy(logits, label), total / label.numel())


def test_ignored_pixels_weigh_one_beside_class_weights():
    logits, label, weight = _inputs((4, 4), (4, 4))
    total = F.cross_entropy(logits, label, weight, ignore_index=255, reduction="sum")
    valid = label != 255
    expected = total / (weight[label[valid]].sum() + (~valid).sum())
    torch.testing.assert_close(upsample_cross_entropy(logits, label, class_weight=weight), expected)


def test_float32_agrees_with_float64_to_rounding():
    logits, label, _ = _inputs((16, 20), (64, 80), num_classes=150)
    exact = upsample_cross_entropy(logits, label)
    single = upsample_cross_entropy(logits.float(), label)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=0)


def test_more_than_255_classes_with_their_own_ignore_index():
    logits, label, _ = _inputs((4, 4), (9, 9), num_classes=300)
    label[:, 0] = 255  # a class like any other
    label[:, 1] = -100
    expected = F.cross_entropy(
        F.interpolate(logits, (9, 9), mode="bilinear", align_corners=False), label
    )
    loss = upsample_cross_entropy(logits, label, ignore_index=-100, average="valid")
    torch.testing.assert_close(loss, expected)


def test_uint8_labels_give_the_same_loss():
    logits, label, _ = _inputs((4, 4), (8, 8))
    expected = upsample_cross_entropy(logits, label)
    assert upsample_cross_entropy(logits, label.to(torch.uint8)) == expected


def test_bf16_logits_under_autocast_are_computed_in_float32():
    logits, label, _ = _inputs((4, 4), (8, 8))
    half = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = upsample_cross_entropy(half, label)
    torch.testing.assert_close(loss, upsample_cross_entropy(half.detach().float(), label))
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_an_image_without_any_label_has_loss_zero_and_no_gradient():
    logits, label, _ = _inputs((4, 4), (8, 8))
    loss = upsample_cross_entropy(logits, torch.full_like(label, 255), average="valid")
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_label_outside_the_classes_is_named():
    logits, label, _ = _inputs((4, 4), (8, 8))
    label[0, 0, 0] = 77
    with pytest.raises(SegmillError, match=r"value 77, but there are 6 classes"):
        upsample_cross_entropy(logits, label)


@pytest.mark.parametrize(
    ("case", "options"),
    [("ce", {}), ("ce_avg_non_ignore", {"average": "valid"})],
)
def test_upsample_cross_entropy_against_mmsegmentation(case, options):
    logits, label, _ = loss_inputs()
    leaf = torch.from_numpy(logits).requires_grad_()
    loss = upsample_cross_entropy(leaf, torch.from_numpy(label), **options)
    loss.backward()
    golden = component("losses")[case]
    assert leaf.grad is not None
    assert loss.item() == pytest.approx(golden["value"], rel=1e-6)
    assert leaf.grad.double().abs().sum().item() == pytest.approx(golden["grad_abs_sum"], rel=1e-6)
    assert leaf.grad[0, :4, 0, 0].tolist() == pytest.approx(golden["grad_first"], rel=1e-4)


def test_class_weights_against_mmsegmentation():
    logits, label, weight = loss_inputs()
    label[label == 255] = 0  # the original cannot do both: it indexes the weights with 255
    loss = upsample_cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(label), class_weight=torch.tensor(weight)
    )
    golden = component("losses")["ce_class_weight_LABEL0"]
    assert loss.item() == pytest.approx(golden["value"], rel=1e-6)


def test_half_resolution_logits_against_mmsegmentation():
    logits, label, _ = loss_inputs()
    half = torch.from_numpy(logits)[:, :, ::2, ::2]
    loss = upsample_cross_entropy(half, torch.from_numpy(label))
    golden = component("losses")["head_loss_half_res"]
    assert loss.item() == pytest.approx(golden["loss_ce"], rel=1e-6)
