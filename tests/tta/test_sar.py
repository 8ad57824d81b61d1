import copy
import math

import pytest
import torch
from torch.distributions import Categorical

from segmill.errors import SegmillError
from tiny_methods import (
    VIEWS,
    BatchNormNet,
    LayerNormNet,
    TorchUpdater,
    adapted,
    method_of,
    optimizer_of,
    tiny_combined,
    weights_of,
)

NETWORKS = [BatchNormNet, LayerNormNet]
MARGIN = 0.4 * math.log(5)
# float32; sums in another order, and the climb divides by a norm.
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def entropy_of(model, views):
    return Categorical(logits=model(views.image).movedim(1, -1)).entropy()


def reference(model, *, layers, lr, rho=0.05, recover_below=0.2):
    """SAR as in the paper's algorithm, a pixel being a sample; returns weights and averages."""
    network = model.discriminative.network
    named = dict(network.named_parameters())
    weights = [named[name] for name in named if name.rpartition(".")[0] in layers]
    source = [each.detach().clone() for each in weights]
    velocity = [torch.zeros_like(each) for each in weights]
    average, averages = None, []
    for views in VIEWS:
        entropy = entropy_of(model, views)
        reliable = entropy < MARGIN
        gradients = torch.autograd.grad(entropy[reliable].mean(), weights)
        norm = torch.cat([each.flatten() for each in gradients]).norm()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.data += rho * gradient / norm
        climbed = entropy_of(model, views)[reliable]
        loss = climbed[climbed < MARGIN].mean()
        steps = torch.autograd.grad(loss, weights)
        for weight, gradient, step, speed in zip(weights, gradients, steps, velocity, strict=True):
            weight.data -= rho * gradient / norm
            speed.mul_(0.9).add_(step)
            weight.data -= lr * speed
        average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        averages.append(average)
        if average < recover_below:
            average = None
            for weight, original, speed in zip(weights, source, velocity, strict=True):
                weight.data.copy_(original)
                speed.zero_()
    return named, averages


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recover_below", [0.0, 0.4], ids=["never", "recovers"])
def test_weights_are_those_of_the_papers_algorithm(network, recover_below):
    model = tiny_combined(network)
    source = copy.deepcopy(dict(model.discriminative.network.named_parameters()))
    layers = network.LAYERS
    expected, averages = reference(
        copy.deepcopy(model), layers=layers, lr=0.05, recover_below=recover_below
    )
    adapted("sar", model, recover_below=recover_below, frozen_share=0.0)
    recoveries = sum(each < recover_below for each in averages)
    assert (recoveries > 0) == (recover_below > 0)
    for name, found in model.discriminative.network.named_parameters():
        torch.testing.assert_close(found, expected[name], **CLOSE)
        moved = (found - source[name]).abs().max() > 1e-4
        if averages[-1] >= recover_below:
            assert moved == (name.rpartition(".")[0] in layers)


def test_unreliable_pixels_have_no_part_in_the_loss_and_the_gradient():
    model = tiny_combined(LayerNormNet)
    entropy = entropy_of(model, VIEWS[0])
    reliable = entropy < MARGIN
    assert 0.05 < reliable.float().mean() < 0.95
    _, _, losses = adapted("sar", model)
    torch.testing.assert_close(losses[0], entropy[reliable].mean().detach(), **CLOSE)


def test_an_image_without_reliable_pixels_changes_nothing():
    model = tiny_combined(LayerNormNet, sharpness=0.01)
    before = weights_of(model)
    method = method_of("sar", model)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    updater.optimizer.zero_grad()
    logits, loss = method.adapt(VIEWS[0], updater, torch.Generator())
    assert torch.equal(logits, method.predict(VIEWS[0]))
    assert loss == 0
    assert updater.steps == 0
    assert all(each.grad is None for each in method.parameters_to_update().values())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_collapsed_model_starts_from_the_source_again_bit_for_bit():
    model = tiny_combined(LayerNormNet)
    before = weights_of(model)
    method = method_of("sar", model, recover_below=10.0)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    for views in VIEWS:
        method.adapt(views, updater, torch.Generator())
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        assert not updater.optimizer.state
    assert updater.steps == 3


@pytest.mark.parametrize(("memory", "recovers"), [(0.0, True), (1.0, False)])
def test_the_moving_average_decides_over_the_recovery(memory, recovers):
    """The loss of one image falls step by step; with memory 1 its first value stays the average."""
    model = tiny_combined(LayerNormNet)
    entropy = entropy_of(model, VIEWS[0])
    first = entropy[entropy < MARGIN].mean().item()
    method = method_of("sar", model, memory=memory, recover_below=0.9 * first)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    stateless = 0
    for _ in range(8):
        method.adapt(VIEWS[0], updater, torch.Generator())
        stateless += not updater.optimizer.state
    assert (stateless > 0) == recovers
    assert stateless < 8


@pytest.mark.parametrize(("share", "updated"), [(0.0, 3), (0.25, 3), (0.34, 2), (0.7, 1)])
def test_the_layers_next_to_the_logits_are_frozen(share, updated):
    method = method_of("sar", tiny_combined(LayerNormNet), frozen_share=share)
    prefix = "discriminative.network."
    names = [name.removeprefix(prefix) for name in method.parameters_to_update()]
    assert names == [
        f"{layer}.{kind}" for layer in LayerNormNet.LAYERS[:updated] for kind in ("weight", "bias")
    ]


def test_no_layer_left_to_update_is_refused():
    with pytest.raises(SegmillError, match=r"frozen_share=1\.0"):
        method_of("sar", tiny_combined(LayerNormNet), frozen_share=1.0)
