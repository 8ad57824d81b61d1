import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from segmill.errors import SegmillError
from segmill.tta.entropy import pixel_entropy
from tiny_methods import (
    VIEWS,
    BatchNormNet,
    LayerNormNet,
    adapted,
    method_of,
    tiny_combined,
)

NETWORKS = [BatchNormNet, LayerNormNet]
# float32; the entropy and its gradient are summed in another order.
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def reference(model, *, lr: float):
    """Tent as in the paper's pseudo-code; BatchNorms that see the image are in train mode."""
    network = model.discriminative.network
    for name in ("first", "second"):
        getattr(network, name).train()
    weights = [
        each
        for name, each in network.named_parameters()
        if name.rpartition(".")[0] in network.LAYERS
    ]
    velocity = [torch.zeros_like(each) for each in weights]
    for views in VIEWS:
        entropy = Categorical(logits=model(views.image).movedim(1, -1)).entropy().mean()
        gradients = torch.autograd.grad(entropy, weights)
        for weight, speed, gradient in zip(weights, velocity, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            weight.data.sub_(lr * speed)
    return dict(network.named_parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_those_of_the_papers_few_lines(network):
    model = tiny_combined(network)
    expected = reference(copy.deepcopy(model), lr=0.05)
    before = copy.deepcopy(dict(model.discriminative.network.named_parameters()))
    adapted("tent", model, batch_statistics=True)
    for name, found in model.discriminative.network.named_parameters():
        torch.testing.assert_close(found, expected[name], **CLOSE)
        # Moved by far more than the tolerance.
        learns = name.rpartition(".")[0] in network.LAYERS
        assert learns == ((found - before[name]).abs().max() > 1e-3)


def test_layers_are_found_by_type_not_by_name():
    model = tiny_combined(LayerNormNet)
    model.discriminative.network.norm = nn.Linear(2, 2)  # a name that says norm
    model.discriminative.network.group = nn.Sequential(nn.GroupNorm(2, 4), nn.RMSNorm(4))
    found = method_of("tent", model).parameters_to_update()
    prefix = "discriminative.network."
    layers = {name.removeprefix(prefix).rpartition(".")[0] for name in found}
    assert layers == {*LayerNormNet.LAYERS, "group.0", "group.1"}


def test_a_model_without_normalisation_layers_is_refused():
    model = tiny_combined(LayerNormNet)
    model.discriminative.network = nn.Conv2d(3, 2, 1)
    with pytest.raises(SegmillError, match=r"Conv2d has none.*tta=cotta"):
        method_of("tent", model)


def test_entropy_is_zero_when_sure_and_ln_k_when_all_classes_are_alike():
    logits = torch.zeros(1, 5, 1, 2)
    logits[0, 3, 0, 1] = 1000.0
    entropy = pixel_entropy(logits)
    assert entropy[0, 0, 0].item() == pytest.approx(math.log(5))
    assert entropy[0, 0, 1] == 0


def test_the_loss_is_the_mean_entropy_of_the_prediction_before_the_step():
    model = tiny_combined(LayerNormNet)
    expected = Categorical(logits=model(VIEWS[0].image).movedim(1, -1)).entropy().mean()
    _, _, losses = adapted("tent", model)
    torch.testing.assert_close(losses[0], expected.detach(), **CLOSE)
