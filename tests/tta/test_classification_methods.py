"""What all methods that need no guide have in common, on batches of four images a step."""

import copy

import pytest
import torch
from torch.distributions import Categorical

from segmill.tta.batch_statistics import BatchStatistics
from tiny_classifiers import (
    BATCHES,
    CLASSIFIERS,
    CLOSE,
    LayerNormClassifier,
    adapt_to_batches,
    batch_statistics_on,
    check_same_weights,
    momentum_step,
    norm_weights,
)
from tiny_methods import method_of, tiny_combined, weights_of

SAR = {"entropy_share": 0.7, "recover_below": 0.0, "frozen_share": 0.0}
COTTA = {"copies": 2, "threshold": 1.0, "momentum": 0.5, "restore": 0.3}
SETTINGS = {
    "tent": {},
    "sar": SAR,
    "eata": {"entropy_share": 0.9, "redundancy": 1.0},
    "rotta": {"update_every": 4, "momentum": 0.5},
    "cotta": {"ratios": [1.0, 1.5], "multiple": 8, "momentum": 0.5},
    "cotta_classification": COTTA,
    "memo": {"copies": 3},
}  # all that learn; bn is below
EPISODIC, DRAWING = {"memo"}, {"rotta", "cotta", "cotta_classification", "memo"}
METHODS = pytest.mark.parametrize("name", list(SETTINGS))


def made(name, network=LayerNormClassifier):
    return method_of(name, tiny_combined(network), **SETTINGS[name])


@METHODS
@pytest.mark.parametrize("network", CLASSIFIERS)
def test_nothing_but_the_chosen_parameters_changes(name, network):
    method = made(name, network)
    before = weights_of(method.model)
    logits, losses, _ = adapt_to_batches(method)
    assert len(logits) == len(losses) == len(BATCHES)
    assert all(each.shape == (4, 5, 1, 1) and not each.requires_grad for each in logits)
    assert not any(each.requires_grad for each in losses)
    chosen = set() if name in EPISODIC else set(method.parameters_to_update())
    for key, value in method.model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in chosen), key


@METHODS
def test_after_reset_and_the_sources_weights_it_is_as_a_new_one(name):
    method = made(name)
    source = weights_of(method.model)
    logits, _, _ = adapt_to_batches(method)
    method.model.load_state_dict(source)
    method.reset()
    again, _, _ = adapt_to_batches(method)
    assert all(torch.equal(a, b) for a, b in zip(again, logits, strict=True))


@METHODS
def test_the_handed_generator_decides_every_bit(name):
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        method = made(name)
        logits, _, _ = adapt_to_batches(method, seed=seed)
        runs.append(torch.cat([*logits, method.predict(BATCHES[0])]))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (name not in DRAWING)


def entropy_of(model, views):
    return Categorical(logits=model(views.image).flatten(1)).entropy()


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_tent_takes_the_mean_entropy_of_the_batch(network):
    model = tiny_combined(network)
    before, other = weights_of(model.discriminative.network), copy.deepcopy(model)
    batch_statistics_on(other.discriminative.network)
    weights = norm_weights(other.discriminative.network)
    velocity = [torch.zeros_like(each) for each in weights]
    for views in BATCHES:
        gradients = torch.autograd.grad(entropy_of(other, views).mean(), weights)
        momentum_step(weights, gradients, velocity, 0.05)
    adapt_to_batches(method_of("tent", model), batch_statistics=True)
    check_same_weights(model.discriminative.network, other.discriminative.network, before)


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_sar_chooses_images_of_the_batch(network):
    model = tiny_combined(network)
    before, other = weights_of(model.discriminative.network), copy.deepcopy(model)
    batch_statistics_on(other.discriminative.network)
    weights = norm_weights(other.discriminative.network)
    velocity, counts = [torch.zeros_like(each) for each in weights], []
    margin = 0.7 * torch.log(torch.tensor(5.0))
    for views in BATCHES:
        entropy = entropy_of(other, views)
        reliable = entropy < margin
        counts.append(int(reliable.sum()))
        climb = torch.autograd.grad(entropy[reliable].mean(), weights)
        norm = torch.cat([each.flatten() for each in climb]).norm()
        start = [each.detach().clone() for each in weights]
        for weight, gradient in zip(weights, climb, strict=True):
            weight.data += 0.05 * gradient / norm
        climbed = entropy_of(other, views)[reliable]
        gradients = torch.autograd.grad(climbed[climbed < margin].mean(), weights)
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)
        momentum_step(weights, gradients, velocity, 0.02)
    assert any(0 < each < 4 for each in counts)
    adapt_to_batches(method_of("sar", model, **SAR), lr=0.02, batch_statistics=True)
    check_same_weights(model.discriminative.network, other.discriminative.network, before)


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_bn_normalises_by_the_batch(network):
    model = tiny_combined(network)
    other = copy.deepcopy(model)
    batch_statistics_on(other.discriminative.network)
    statistics = BatchStatistics(model.discriminative)
    statistics.apply()
    found = method_of("bn", model).predict(BATCHES[0])
    statistics.undo()
    torch.testing.assert_close(found, other(BATCHES[0].image).detach(), **CLOSE)
