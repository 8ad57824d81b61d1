"""The fused class map against torch's own chain: interpolate, then argmax."""

import pytest
import torch
import torch.nn.functional as F

from segmill.ops import upsample_argmax as module
from segmill.ops.upsample_argmax import upsample_argmax


def _logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("small", "large"),
    [((5, 7), (17, 23)), ((8, 8), (32, 32)), ((6, 5), (6, 5)), ((9, 8), (4, 5)), ((1, 1), (5, 4))],
)
def test_labels_equal_torch(small, large, align_corners, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 500)
    logits = _logits(2, 11, *small)
    wide = F.interpolate(logits, large, mode="bilinear", align_corners=align_corners)
    pred = upsample_argmax(logits, large, align_corners=align_corners)
    assert torch.equal(pred, wide.argmax(1).to(torch.uint8))


def test_lowest_class_wins_a_tie():
    logits = torch.zeros(1, 5, 3, 3)
    logits[:, [2, 4]] = 1.0
    assert (upsample_argmax(logits, (7, 7)) == 2).all()


def test_256_classes_fit_uint8_and_257_do_not():
    assert upsample_argmax(_logits(1, 256, 2, 2), (4, 4)).dtype == torch.uint8
    logits = _logits(1, 257, 2, 2)
    logits[:, 256] = 9.0
    pred = upsample_argmax(logits, (4, 4))
    assert pred.dtype == torch.int64
    assert (pred == 256).all()


def test_bf16_logits_are_upsampled_in_float32():
    logits = _logits(1, 20, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pred = upsample_argmax(logits, (32, 32))
    assert torch.equal(pred, upsample_argmax(logits.float(), (32, 32)))
