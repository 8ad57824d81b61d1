"""The smallest variants learn; that every variant builds is `test_configs`' matter."""

import math

import gate
import pytest
import torch
from torch.nn.functional import one_hot

TINY = [
    (f"{family}_tiny{suffix}", channels)
    for family in ("fcn", "deeplabv3plus", "segformer")
    for suffix, channels in (("", 3), ("_rgbd", 4))
]


@pytest.mark.parametrize(("name", "channels"), TINY)
def test_a_small_variant_is_small(name, channels):
    network = gate.build(name, num_classes=8, channels=channels)
    assert 70_000 < sum(parameter.numel() for parameter in network.parameters()) < 300_000


@pytest.mark.parametrize(("name", "channels"), TINY)
def test_a_small_variant_learns(name, channels):
    torch.manual_seed(0)
    network = gate.build(name, num_classes=3, channels=channels).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    label = (torch.rand(4, 6, 8) * 3).long().repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = 2 * one_hot(label, channels).permute(0, 3, 1, 2).float() - 1
    losses = []
    for _ in range(15):
        terms = network.losses(image, label)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(terms["decode.loss_ce"].item())
    # Untrained, all classes are equally likely.
    assert abs(losses[0] - math.log(3)) < 0.1
    assert losses[-1] < 0.7 * losses[0]


def test_a_label_may_be_eight_bit():
    network = gate.build("fcn_tiny", num_classes=3).eval()
    image, label = torch.rand(1, 3, 32, 32), torch.randint(0, 3, (1, 32, 32))
    with torch.no_grad():
        wide, narrow = network.losses(image, label), network.losses(image, label.to(torch.uint8))
    assert wide == narrow
