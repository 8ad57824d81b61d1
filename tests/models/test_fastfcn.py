import torch

from segmill.models.families.fastfcn import JPU


def test_the_last_map_becomes_one_of_the_first_ones_size():
    neck = JPU(in_channels=[4, 6, 8], channels=5, dilations=[1, 2]).eval()
    features = [torch.rand(1, 4, 9, 7), torch.rand(1, 6, 5, 4), torch.rand(1, 8, 3, 2)]
    first, second, joined = neck(features)
    assert neck.channels == (4, 6, 10)
    assert first is features[0]
    assert second is features[1]
    assert joined.shape == (1, 10, 9, 7)


def test_every_map_takes_part():
    neck = JPU(in_channels=[4, 6, 8], channels=5, dilations=[1, 2]).train()
    features = [torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4), torch.rand(2, 8, 2, 2)]
    for feature in features:
        feature.requires_grad_()
    neck(features)[-1].square().sum().backward()
    assert all(feature.grad is not None and feature.grad.any() for feature in features)


def test_no_activation_stands_between_the_filters_and_their_mixing():
    neck = JPU(in_channels=[4], channels=5, dilations=[1])
    assert not hasattr(neck.dilation_layers[0][0].depthwise_conv, "activate")
    assert hasattr(neck.dilation_layers[0][0].pointwise_conv, "activate")
