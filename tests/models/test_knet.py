"""K-Net's kernels at tiny sizes; the whole network is compared with the original elsewhere."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from segmill.models.families.fcn import FCNHead
from segmill.models.families.knet import IterativeDecodeHead, KernelUpdateHead, KernelUpdator


@pytest.fixture
def head():
    torch.manual_seed(0)
    generate = partial(
        FCNHead,
        in_index=0,
        channels=8,
        num_convs=1,
        kernel=3,
        concat_input=False,
        dropout=0.0,
        num_classes=3,
    )
    return IterativeDecodeHead(
        in_channels=[6],
        kernel_generate_head=generate,
        num_stages=2,
        update_channels=4,
        num_heads=2,
        feedforward_channels=16,
        num_mask_fcs=1,
    )


@pytest.fixture
def features():
    return [torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(1))]


def test_the_answer_is_the_last_stage_in_training_too(head, features):
    for network in (head.eval(), head.train()):
        stages = network.stages(features)
        assert [each.shape for each in stages] == [(2, 3, 5, 7)] * 3
        torch.testing.assert_close(network(features), stages[-1])


def test_every_stage_has_a_loss_over_all_pixels_in_eval_mode_too(head, features):
    label = torch.randint(0, 3, (2, 10, 14), generator=torch.Generator().manual_seed(2))
    label[:, :5] = 255
    losses = head.eval().losses(features, label)
    assert list(losses) == ["loss_ce.s0", "loss_ce.s1", "loss_ce.s2"]
    for loss, logits in zip(losses.values(), head.stages(features), strict=True):
        wide = F.interpolate(logits, (10, 14), mode="bilinear", align_corners=False)
        total = F.cross_entropy(wide, label, ignore_index=255, reduction="sum")
        torch.testing.assert_close(loss, total / label.numel())


def test_the_last_stage_alone_trains_everything(head, features):
    (3 * head(features)).softmax(1)[:, 0].sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
    assert head.kernel_generate_head.conv_seg.weight.grad.abs().min() > 0


def test_groups_of_a_kernel_share_their_update():
    torch.manual_seed(0)
    updator = KernelUpdator(4)
    group, kernels = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    whole = updator(group, kernels)
    halves = [updator(group[..., part], kernels[..., part]) for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, torch.cat(halves, 2))


def test_a_kernel_sees_the_pixels_of_its_class_only():
    torch.manual_seed(0)
    update = KernelUpdateHead(
        channels=4, update_channels=4, num_heads=1, feedforward_channels=8, num_mask_fcs=1
    )
    for part in (update.attention, update.ffn):  # what mixes the kernels
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    hidden, kernels = torch.randn(1, 4, 2, 2), torch.randn(1, 2, 4)
    logits = torch.full((1, 2, 2, 2), -100.0)
    logits[0, 0, 0], logits[0, 1, 1] = 100.0, 100.0  # class 0 above, class 1 below
    _, before = update(hidden, kernels, logits)
    changed = hidden.clone()
    changed[:, :, 1] += 1.0
    _, after = update(changed, kernels, logits)
    assert torch.equal(before[0, 0], after[0, 0])
    assert not torch.allclose(before[0, 1], after[0, 1])
