from functools import partial

import pytest
import torch

from segmill.models.families.fcn import FCNHead
from segmill.models.families.ocrnet import OCRHead, OCRNet, class_features
from segmill.models.layers import cross_entropy


class Backbone(torch.nn.Module):
    channels, strides = (3, 6), (1, 2)

    def forward(self, image):
        return [image, image[..., ::2, ::2].repeat(1, 2, 1, 1)]

    def key_rules(self):
        return {"mmseg": ()}


def ocrnet(**changes):
    sizes = {"in_index": [0, 1], "channels": 8, "dropout": 0.0, "num_classes": 4}
    fcn = {"num_convs": 1, "kernel": 1, "concat_input": False}
    settings = {
        "backbone": Backbone(),
        "coarse_head": partial(FCNHead, **sizes, **fcn),
        "coarse_weight": 0.4,
        "decode_head": partial(OCRHead, **sizes, ocr_channels=4),
        "class_weight": None,
    }
    return OCRNet(**(settings | changes))


def batch():
    torch.manual_seed(0)
    return torch.rand(2, 3, 15, 18), torch.randint(0, 4, (2, 15, 18))


def test_a_class_is_the_mean_feature_of_the_pixels_that_are_certain_of_it():
    feature = torch.rand(1, 5, 2, 3)
    logits = torch.zeros(1, 2, 2, 3)
    logits[0, 0, 1, 2] = 100.0  # class 1 has every pixel alike
    classes = class_features(feature, logits)[0, :, :, 0]
    torch.testing.assert_close(classes[:, 0], feature[0, :, 1, 2])
    torch.testing.assert_close(classes[:, 1], feature[0].flatten(1).mean(1))


def test_the_coarse_head_learns_from_both_losses():
    image, label = batch()
    network = ocrnet()
    terms = network.losses(image, label)
    assert list(terms) == ["decode_0.loss_ce", "decode_1.loss_ce"]
    terms["decode_1.loss_ce"].backward()
    assert network.decode_head[0].conv_seg.weight.grad.abs().sum() > 0


def test_the_coarse_loss_is_weighed():
    image, label = batch()
    network = ocrnet().eval()
    with torch.no_grad():
        coarse = network.decode_head[0](network.backbone(image))
        terms = network.losses(image, label)
    wanted = 0.4 * cross_entropy(coarse, label, None)
    torch.testing.assert_close(terms["decode_0.loss_ce"], wanted)


def test_class_weights_count_in_both_losses():
    image, _ = batch()
    ones = torch.ones(2, 15, 18, dtype=torch.int64)
    with torch.no_grad():
        plain, weighed = ocrnet().eval(), ocrnet(class_weight=[1.0, 0.0, 1.0, 1.0]).eval()
        assert all(term > 0 for term in plain.losses(image, ones).values())
        assert all(term == 0 for term in weighed.losses(image, ones).values())


def test_statistics_of_the_coarse_head_move_as_if_it_ran_twice():
    image, label = batch()
    network = ocrnet().train()
    norm = network.decode_head[0].convs[0].bn
    norm.running_mean.fill_(1.0)
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network.losses(image, label)
    mean = seen[0].mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, 0.9 * (0.9 + 0.1 * mean) + 0.1 * mean)
    assert network.decode_head[1].bottleneck.bn.momentum == pytest.approx(0.1)
