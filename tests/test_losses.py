"""Every loss against what MMSegmentation 1.2.2 computed on the same logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from golden import component, loss_inputs
from segmill.losses import (
    binary_cross_entropy,
    dice,
    focal,
    lovasz_softmax,
    ohem_by_rank,
    ohem_by_threshold,
    ohem_cross_entropy,
    tversky,
)

CASES = {
    "bce_sigmoid": partial(binary_cross_entropy, average="all"),
    "bce_sigmoid_non_ignore": partial(binary_cross_entropy, average="valid"),
    "dice": dice,
    "dice_activate_sigmoid": dice,
    "dice_naive_sigmoid": partial(dice, denominator="plain"),
    "lovasz": partial(lovasz_softmax, per_image=False),
    "lovasz_present": partial(lovasz_softmax, per_image=True),
    "tversky": partial(tversky, alpha=0.3, beta=0.7),
    "ohem_ce_NO_IGNORE_KW": partial(ohem_cross_entropy, threshold=0.9, min_kept=200),
}


def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    logits, label, _ = loss_inputs()
    return torch.from_numpy(logits).requires_grad_(), torch.from_numpy(label)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_against_mmsegmentation(case):
    logits, label = _tensors()
    loss = CASES[case](logits, label)
    loss.backward()
    golden = component("losses")[case]
    assert logits.grad is not None
    assert loss.item() == pytest.approx(golden["value"], rel=1e-6)
    assert logits.grad.double().abs().sum().item() == pytest.approx(
        golden["grad_abs_sum"], rel=1e-6
    )
    # Single entries of a long float32 chain; the sums above are the sharp check.
    assert logits.grad[0, :4, 0, 0].tolist() == pytest.approx(golden["grad_first"], rel=1e-4)


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("ohem_thresh", partial(ohem_by_threshold, threshold=0.05, min_kept=100)),
        ("ohem_topk", partial(ohem_by_rank, kept=100)),
    ],
)
def test_hard_pixel_samplers_against_mmsegmentation(case, loss):
    value = loss(*_tensors()).item()
    assert value == pytest.approx(component("losses")[case]["value"]["loss_ce"], rel=1e-6)


def test_focal_without_focus_is_half_the_binary_cross_entropy():
    # The original fails on the CPU (it slices the wrong axis), so plain torch is the reference.
    logits, label = _tensors()
    half = binary_cross_entropy(logits, label, average="all") / 2
    torch.testing.assert_close(focal(logits, label, gamma=0.0, alpha=0.5), half)


def test_focal_equals_its_formula_in_plain_torch():
    logits, label = _tensors()
    target = F.one_hot(label.clamp(max=19), 20)[..., :19].movedim(-1, 1).float()
    target = target * (label != 255).unsqueeze(1)
    true_prob = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
    alpha = torch.where(target > 0, 0.25, 0.75)
    loss = -alpha * (1 - true_prob).square() * true_prob.log()
    expected = (loss * (label != 255).unsqueeze(1)).mean()
    torch.testing.assert_close(focal(logits, label, gamma=2.0, alpha=0.25), expected)


@pytest.mark.parametrize(
    "loss", [*CASES.values(), partial(focal, gamma=2.0, alpha=0.5), partial(ohem_by_rank, kept=9)]
)
def test_no_labelled_pixel_gives_a_finite_loss(loss):
    logits, label = _tensors()
    value = loss(logits, torch.full_like(label, 255))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
