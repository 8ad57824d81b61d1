"""MixedStatistics on layers of its own; what MEMO and RoTTA make of it is in their tests."""

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor

from segmill.tta.batch_statistics import BatchStatistics
from segmill.tta.mixed_statistics import MixedStatistics

SHARE = 0.25


def drawn_layer() -> BatchNormAct2d:
    """As EfficientNet, RegNet and others of timm have it: BatchNorm and ReLU in one forward."""
    generator = torch.Generator().manual_seed(0)
    layer = BatchNormAct2d(3).eval()
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(generator=generator)
            if name == "running_var":
                tensor.abs_()
    return layer


def mixed_by_hand(layer: BatchNormAct2d, values: Tensor) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean = (1 - SHARE) * layer.running_mean + SHARE * values.mean(dim=(0, 2, 3))
    var = (1 - SHARE) * layer.running_var + SHARE * values.var(dim=(0, 2, 3), correction=0)
    normal = (values - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
    return (normal * layer.weight[:, None, None] + layer.bias[:, None, None]).relu()


@pytest.mark.parametrize("gradient", [False, True])
def test_what_a_layer_does_after_normalising_is_done(gradient: bool) -> None:
    layer, values = drawn_layer(), torch.rand(2, 3, 4, 4, requires_grad=True)
    statistics = MixedStatistics(layer, share=SHARE, correction=0, gradient=gradient)
    with statistics.mixed(keep=False):
        found = layer(values)
    expected = mixed_by_hand(layer, values)
    assert (expected == 0).any()
    # float32; the same operations in another order.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if gradient:
        ours, theirs = (torch.autograd.grad(each.sum(), values)[0] for each in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_layers_own_statistics_are_back_whatever_happens() -> None:
    layer = drawn_layer()
    own, values = (layer.running_mean, layer.running_var), torch.rand(2, 3, 4, 4)
    batch = BatchStatistics(layer)
    batch.apply()
    with MixedStatistics(layer, share=SHARE, correction=0, gradient=False).mixed(keep=True):
        layer(values)
        with pytest.raises(RuntimeError):
            layer(torch.rand(2, 5, 4, 4))
    assert layer.running_mean is own[0]
    assert layer.running_var is own[1]


def test_the_output_is_of_the_inputs_type() -> None:
    layer = drawn_layer()
    with MixedStatistics(layer, share=SHARE, correction=0, gradient=False).used():
        assert layer(torch.rand(2, 3, 4, 4).bfloat16()).dtype is torch.bfloat16
