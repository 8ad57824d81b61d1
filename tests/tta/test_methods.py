"""What all methods that need no guide have in common."""

import copy

import pytest
import torch

from segmill.tta.batch_statistics import BatchStatistics
from tiny_methods import (
    VIEWS,
    BatchNormNet,
    LayerNormNet,
    TorchUpdater,
    adapt_to_all,
    adapted,
    method_of,
    optimizer_of,
    tiny_combined,
    weights_of,
)

# Far enough to be seen after three images, sizes for small ones, nothing that starts anew.
SETTINGS = {
    "tent": {},
    "sar": {"recover_below": 0.0},
    "cotta": {"ratios": [1.0, 1.5], "multiple": 8, "momentum": 0.5},
}
METHODS = pytest.mark.parametrize("name", list(SETTINGS))
NETWORKS = pytest.mark.parametrize("network", [BatchNormNet, LayerNormNet])
STATISTICS = pytest.mark.parametrize("batch_statistics", [False, True])


@METHODS
@NETWORKS
@STATISTICS
def test_nothing_but_the_chosen_parameters_changes(name, network, batch_statistics):
    model = tiny_combined(network)
    before = weights_of(model)
    method, _, _ = adapted(name, model, batch_statistics=batch_statistics, **SETTINGS[name])
    chosen = set(method.parameters_to_update())
    assert chosen
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in chosen), key


@METHODS
@STATISTICS
def test_every_module_is_in_eval_mode_all_the_time(name, batch_statistics):
    model = tiny_combined(BatchNormNet)
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda each, _: seen.append(each.training))
    adapted(name, model, batch_statistics=batch_statistics, **SETTINGS[name])
    assert seen
    assert not any(seen)
    assert not any(module.training for module in model.modules())


@METHODS
@NETWORKS
def test_adapt_returns_what_predict_gave_before_the_update(name, network):
    model = tiny_combined(network)
    method = method_of(name, model, **SETTINGS[name])
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    before = method.predict(VIEWS[0])
    logits, loss = method.adapt(VIEWS[0], updater, torch.Generator())
    assert torch.equal(logits, before)
    assert not logits.requires_grad
    assert not loss.requires_grad
    assert not torch.equal(method.predict(VIEWS[0]), before)
    assert not method.predict(VIEWS[0]).requires_grad


@METHODS
def test_after_reset_and_the_sources_weights_it_is_as_a_new_one(name):
    model = tiny_combined(LayerNormNet)
    source = copy.deepcopy(model.state_dict())
    method, logits, _ = adapted(name, model, **SETTINGS[name])
    after = weights_of(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(source[key])
    method.reset()
    again, _ = adapt_to_all(method, TorchUpdater(optimizer_of(method.parameters_to_update())))
    assert all(torch.equal(a, b) for a, b in zip(again, logits, strict=True))
    assert all(torch.equal(each, after[key]) for key, each in model.state_dict().items())


@METHODS
def test_the_handed_generator_decides_every_bit(name):
    def run(seed):
        model = tiny_combined(LayerNormNet)
        adapted(name, model, seed=seed, **SETTINGS[name])
        return torch.cat([each.detach().flatten() for each in model.parameters()])

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(run(seed=0), first)
    assert torch.equal(run(seed=1), first) == (name != "cotta")


@METHODS
def test_under_autocast_every_pass_sees_the_weights_of_its_time(name):
    """Autocast keeps its copies of the weights for as long as the training step lasts."""

    def run(*, cached):
        model = tiny_combined(LayerNormNet)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            method, logits, losses = adapted(name, model, **SETTINGS[name])
            return [*logits, *losses, method.predict(VIEWS[0])]

    for found, expected in zip(run(cached=True), run(cached=False), strict=True):
        assert torch.equal(found, expected)


@METHODS
@STATISTICS
def test_the_loss_falls_when_an_image_comes_again_and_again(name, batch_statistics):
    model = tiny_combined(BatchNormNet)
    if batch_statistics:
        BatchStatistics(model).apply()
    method = method_of(name, model, **SETTINGS[name])
    updater = TorchUpdater(optimizer_of(method.parameters_to_update(), lr=0.003))
    generator = torch.Generator().manual_seed(0)
    losses = [float(method.adapt(VIEWS[0], updater, generator)[1]) for _ in range(12)]
    assert 0 < losses[-1] < losses[0]
