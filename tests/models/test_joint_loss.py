"""The joint loss, and DUSA's own numbers: selection, loss and gradients of the published code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmill.errors import SegmillError
from segmill.models.class_sets import ClassSets
from segmill.models.class_split import ClassSplit
from segmill.models.joint_loss import mean_prediction
from tiny_adapt import tiny_loss

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "dusa"
CASES = json.loads((GOLDENS / "golden.json").read_text())
ALONE = ClassSplit(0, 1)
# Float32 sums in another order; losses are about 1, gradients about 1e-3.
LOSS = {"atol": 2e-6, "rtol": 0.0}
GRADIENT = {"atol": 2e-8, "rtol": 1e-5}


def golden(case: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDENS / "golden.npz") as arrays:
        names = [each for each in arrays.files if each.startswith(f"{case}/")]
        return {each.partition("/")[2]: torch.from_numpy(arrays[each]) for each in names}


def settings(case: str):
    """The published settings; masked elements count in its mean."""
    known = CASES[case]
    return tiny_loss(
        topk=known["topk"],
        classes_threshold=known.get("cap", 20),
        logits="normed" if known.get("logits_mode", "logits").startswith("normed") else "raw",
        mask_reduction="all",
    )


def check_gradients(stored: dict[str, torch.Tensor], logits: torch.Tensor, pred: torch.Tensor):
    torch.testing.assert_close(logits.grad, stored["grad_raw_logits"], **GRADIENT)
    if "grad_pred" in stored:
        torch.testing.assert_close(pred.grad, stored["grad_pred"], **GRADIENT)


SLIDE = "seg_slide_div8"


@pytest.mark.parametrize("case", [name for name in CASES if name[:3] == "seg" and name != SLIDE])
def test_segmentation_against_the_published_code(case):
    stored, loss = golden(case), settings(case)
    logits, pred = stored["raw_logits"].requires_grad_(), stored["pred"].requires_grad_()
    # It resizes with aligned corners where we sample at the latent cells' centres.
    size = stored["noise"].shape[2:]
    resized = F.interpolate(loss.scaled(logits), size, mode="bilinear", align_corners=True)
    sets = loss.class_sets(resized, torch.Generator(), ALONE)
    if CASES[case]["drawn"]:
        assert len(stored["selected"]) == sets.widths[0]
        everything = torch.ones(1, len(stored["selected"]), dtype=torch.bool)
        sets = ClassSets(stored["selected"][None], everything, stored["mask"][:, 0], sets.widths)
    torch.testing.assert_close(sets.classes[0], stored["selected"], rtol=0, atol=0)
    assert torch.equal(sets.mask, stored["mask"][:, 0])
    predicted = mean_prediction(loss.weights(resized, sets), pred)
    value = loss.losses(predicted, stored["noise"], sets.mask).mean()
    torch.testing.assert_close(value, stored["loss"], **LOSS)
    value.backward()
    check_gradients(stored, logits, pred)


def test_windows_against_the_published_code():
    stored, loss = golden(SLIDE), settings(SLIDE)
    logits, pred = stored["raw_logits"].requires_grad_(), stored["pred"].requires_grad_()
    windows = torch.cat([logits[..., start : start + 8] for start in (0, 3)])
    sets = loss.class_sets(windows, torch.Generator(), ALONE)
    torch.testing.assert_close(sets.classes, stored["selected"], rtol=0, atol=0)
    predicted = mean_prediction(loss.weights(windows, sets), pred[:, 0])
    values = loss.losses(predicted, stored["noise"][:, 0], sets.mask)
    torch.testing.assert_close(values[-1] / 2, stored["loss"], **LOSS)  # it returns only the last
    values.mean().backward()
    check_gradients(stored, logits, pred)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("cls")])
def test_classification_weights_and_loss_against_the_published_code(case):
    stored, loss = golden(case), settings(case)
    logits, pred = stored["raw_logits"].requires_grad_(), stored["pred"].requires_grad_()
    pixels = loss.scaled(logits[:, :, None, None]).expand(-1, -1, 6, 6)
    selected = stored["selected"]
    everything, everywhere = selected >= 0, torch.ones(len(selected), 6, 6, dtype=torch.bool)
    sets = ClassSets(selected, everything, everywhere, (selected.shape[1],) * len(selected))
    if selected.shape[1] == loss.topk:
        own = loss.class_sets(pixels, torch.Generator(), ALONE)
        torch.testing.assert_close(own.classes, selected.sort(dim=1).values, rtol=0, atol=0)
    predicted = mean_prediction(loss.weights(pixels, sets), pred)
    value = loss.losses(predicted, stored["noise"], sets.mask).mean()
    if case.startswith("clsU"):
        value = value + (stored["uncond_pred"] - stored["noise"]).square().mean()
    torch.testing.assert_close(value, stored["loss"], **LOSS)
    value.backward()
    check_gradients(stored, logits, pred)


def some_windows(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, 4, 4, generator=generator)
    predictions = torch.randn(2, 4, 3, 4, 4, generator=generator)
    target = torch.randn(2, 3, 4, 4, generator=generator)
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    classes = torch.tensor([[0, 2, 5, 6], [1, 3, 1, 1]])
    mask = torch.rand(2, 4, 4, generator=generator) > 0.3
    return logits, predictions, target, ClassSets(classes, valid, mask, (4, 2))


def test_weights_are_the_softmax_over_the_windows_own_classes():
    logits, _, _, sets = some_windows()
    weights = tiny_loss(temperature=0.5).weights(logits, sets)
    torch.testing.assert_close(weights[0], (logits[0, [0, 2, 5, 6]] / 0.5).softmax(dim=0))
    torch.testing.assert_close(weights[1, :2], (logits[1, [1, 3]] / 0.5).softmax(dim=0))


def test_padding_weighs_exactly_nothing_and_gets_no_gradient():
    logits, predictions, target, sets = some_windows()
    loss = tiny_loss()
    weights = loss.weights(logits.requires_grad_(), sets)
    assert not weights[1, 2:].any()
    predicted = mean_prediction(weights, predictions.requires_grad_())
    loss.losses(predicted, target, sets.mask).sum().backward()
    assert not predictions.grad[1, 2:].any()
    assert not logits.grad[1, [0, 2, 4, 5, 6]].any()


def test_masked_pixels_count_only_with_mask_reduction_all():
    logits, predictions, target, sets = some_windows()
    predicted = mean_prediction(tiny_loss().weights(logits, sets), predictions)
    squared = (predicted - target).square().movedim(1, -1)
    valid = tiny_loss(mask_reduction="valid").losses(predicted, target, sets.mask)
    every = tiny_loss(mask_reduction="all").losses(predicted, target, sets.mask)
    for window in range(2):
        inside = squared[window][sets.mask[window]]
        torch.testing.assert_close(valid[window], inside.mean())
        torch.testing.assert_close(every[window], inside.sum() / target[0].numel())


def test_the_joint_gradient_is_the_sum_of_the_two_detached_halves():
    logits, predictions, target, sets = some_windows()
    loss = tiny_loss()

    def gradients(detach_weights: bool, detach_predictions: bool):
        own = [logits.clone().requires_grad_(), predictions.clone().requires_grad_()]
        weights = loss.weights(own[0], sets)
        predicted = mean_prediction(
            weights.detach() if detach_weights else weights,
            own[1].detach() if detach_predictions else own[1],
        )
        loss.losses(predicted, target, sets.mask).mean().backward()
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in own]

    joint, first, second = gradients(False, False), gradients(False, True), gradients(True, False)
    for whole, one, other in zip(joint, first, second, strict=True):
        torch.testing.assert_close(whole, one + other, atol=0, rtol=0)


def test_normed_logits_have_unit_length_over_the_classes():
    logits = torch.randn(1, 7, 3, 3) * 9
    lengths = tiny_loss(logits="normed").scaled(logits).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(1, 3, 3))
    assert torch.equal(tiny_loss(logits="raw").scaled(logits), logits)


def test_the_mean_prediction_stays_float32_under_autocast():
    logits, predictions, _, sets = some_windows()
    weights = tiny_loss().weights(logits, sets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = mean_prediction(weights, predictions)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, mean_prediction(weights, predictions), atol=0, rtol=0)


def test_times_are_drawn_within_their_range_and_a_range_of_one_value_is_that_value():
    times = tiny_loss(timestep_range=(0.2, 0.6)).draw_t(500, torch.Generator().manual_seed(0))
    assert 0.2 <= times.min() < 0.22
    assert 0.58 < times.max() <= 0.6
    fixed = tiny_loss(timestep_range=(0.25, 0.25)).draw_t(3, torch.Generator())
    assert fixed.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"topk": 0}, "topk"),
        ({"temperature": 0.0}, "temperature"),
        ({"class_chunk": 0}, "class_chunk"),
        ({"buckets": (0, 4)}, "buckets"),
        ({"cosine": -1.0}, r"model\.loss\.mse=1.0, norm_l2=0.0 and cosine=-1.0"),
        ({"mse": 0.0}, r"model\.loss\.mse=0.0"),
        ({"min_classes": 21}, "model.loss.min_classes=21"),
        ({"timestep_range": (0.5, 0.2)}, "model.loss.timestep_range"),
        ({"timestep_range": (0.5, 100.0)}, "model.loss.timestep_range"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(keys, named):
    with pytest.raises(SegmillError, match=named):
        tiny_loss(**keys)


def test_normalised_error_and_cosine_are_their_formulas():
    _, predictions, target, sets = some_windows()
    predicted = predictions[:, 0].clone().requires_grad_()
    mask = torch.ones_like(sets.mask)
    loss = tiny_loss(mse=0.0, norm_l2=2.0, cosine=0.5).losses(predicted, target, mask).mean()
    found = torch.autograd.grad(loss, predicted)[0]
    error = (predicted - target).square().mean(dim=(1, 2, 3))
    held = (error.detach() + 1e-3).sqrt()
    ours, theirs = predicted.flatten(1), target.flatten(1)
    cosine = (ours * theirs).sum(dim=1) / (ours.norm(dim=1) * theirs.norm(dim=1))
    expected = 2 * (error / held).mean() + 0.5 * (1 - cosine).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, predicted)[0])


def test_the_terms_add_up_and_plain_mse_is_the_default():
    _, predictions, target, sets = some_windows()
    arguments = (predictions[:, 0], target, sets.mask)

    def value(**terms: float) -> torch.Tensor:
        return tiny_loss(**terms).losses(*arguments)

    plain, norm, cosine = value(), value(mse=0.0, norm_l2=1.0), value(mse=0.0, cosine=1.0)
    torch.testing.assert_close(
        value(mse=0.5, norm_l2=2.0, cosine=3.0), 0.5 * plain + 2 * norm + 3 * cosine
    )
    assert not torch.allclose(plain, norm)


def test_masked_pixels_have_no_part_in_the_cosine():
    _, predictions, target, sets = some_windows()
    other = torch.where(sets.mask[:, None], predictions[:, 0], 9.0)
    loss = tiny_loss(mse=0.0, cosine=1.0)
    first = loss.losses(predictions[:, 0], target, sets.mask)
    assert torch.equal(loss.losses(other, target, sets.mask), first)
