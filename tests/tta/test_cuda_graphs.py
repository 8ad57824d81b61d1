"""Recorded passes take the place of a network's own, only where they compute the same."""

from functools import partial

import graphs_on_cpu
import pytest
import torch
from torch import nn

from segmill.optim import SGD, AdamW
from segmill.tta.cuda_graphs import (
    RECORDINGS,
    WARM_UPS,
    Copies,
    RecordedPass,
    Replayed,
    replay_passes,
)
from segmill.tta.dusa import Dusa
from tiny_adapt import tiny_model
from tiny_images import adapt_images, tiny_classifier

needs_gpu = pytest.mark.gpu
COMMON = {"learning_rate": 0.01, "weight_decay": 0.0, "rules": {}, "norm_decay_mult": None}
ADAMW, MOMENTUM = AdamW(**COMMON, betas=(0.9, 0.999)), SGD(**COMMON, momentum=0.9)


class CountedPass:
    """A pass that is run anew: what CUDA replays, on any device."""

    made = 0

    def __init__(self, network, call, inputs, learnt):
        CountedPass.made += 1
        self.call, self.learnt, self.output = call, learnt, None

    def forward(self, inputs):
        with torch.enable_grad():
            self.output = self.call(*inputs)
        return self.output.detach()

    def backward(self, upstream):
        found = torch.autograd.grad(self.output, self.learnt, upstream, allow_unused=True)
        for parameter, gradient in zip(self.learnt, found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@pytest.fixture
def network():
    CountedPass.made = 0
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def _gradients(call, network, *images):
    for image in images:
        call(image).square().sum().backward()
    found = [each.grad for each in network.parameters()]
    network.zero_grad()
    return found


def test_a_pass_is_recorded_once_a_shape_has_come_several_times(network):
    replayed = Replayed(network, CountedPass)
    for _ in range(WARM_UPS):
        replayed(torch.randn(2, 3)).sum().backward()
    assert CountedPass.made == 0
    for _ in range(3):
        replayed(torch.randn(2, 3)).sum().backward()
    assert CountedPass.made == 1


def test_outputs_and_summed_gradients_are_those_of_the_network(network):
    replayed = Replayed(network, CountedPass)
    images = list(torch.randn(WARM_UPS + 3, 2, 3))
    torch.testing.assert_close(
        _gradients(replayed, network, *images), _gradients(network, network, *images)
    )
    assert CountedPass.made == 1
    torch.testing.assert_close(replayed(images[0]), network(images[0]))


def test_an_output_that_may_still_be_differentiated_is_not_overwritten(network):
    replayed = Replayed(network, CountedPass)
    first, second = torch.randn(2, 2, 3)
    for _ in range(WARM_UPS + 1):
        _gradients(replayed, network, first)
    outputs = [replayed(first), replayed(second)]
    sum(each.square().sum() for each in outputs).backward()
    found = [each.grad for each in network.parameters()]
    network.zero_grad()
    torch.testing.assert_close(found, _gradients(network, network, first, second))


def test_an_output_that_was_forgotten_does_not_stand_in_the_way(network):
    replayed = Replayed(network, CountedPass)
    for _ in range(WARM_UPS + 1):
        replayed(torch.randn(2, 3))  # never differentiated
    before = CountedPass.made
    output = replayed(torch.randn(2, 3))
    assert before == 1
    assert "Replay" in type(output.grad_fn).__name__


def test_without_gradients_the_network_itself_is_called(network, caplog):
    replayed = Replayed(network, CountedPass)
    for _ in range(WARM_UPS + 2):
        with torch.no_grad():
            replayed(torch.randn(2, 3))
    assert CountedPass.made == 0
    assert not caplog.records


@pytest.mark.parametrize("named", [False, True])
def test_inputs_that_cannot_be_recorded_reach_the_network_and_are_reported_once(
    network, named, caplog
):
    replayed = Replayed(network, CountedPass)
    image = torch.randn(2, 3, requires_grad=True)
    for _ in range(WARM_UPS + 2):
        output = replayed(input=image) if named else replayed(image)
        output.sum().backward()
    assert CountedPass.made == 0
    assert image.grad is not None
    (said,) = (record.getMessage() for record in caplog.records)
    assert "no effect on the passes of Sequential: it is called with more than tensors" in said


def test_other_weights_to_learn_are_another_pass(network):
    replayed = Replayed(network, CountedPass)
    for _ in range(WARM_UPS + 1):
        _gradients(replayed, network, torch.randn(2, 3))
    network[0].requires_grad_(False)
    found = _gradients(replayed, network, *torch.randn(WARM_UPS + 1, 2, 3))
    assert found[:2] == [None, None]
    assert CountedPass.made == 2


def test_shapes_beyond_the_first_few_run_as_they_are_and_nothing_is_recorded_twice(network):
    replayed = Replayed(network, CountedPass)
    for _ in range(WARM_UPS + 3):
        for count in range(1, RECORDINGS + 3):
            replayed(torch.randn(count, 3)).sum().backward()
    assert CountedPass.made == RECORDINGS


def test_other_weights_to_learn_make_room_for_their_passes(network):
    replayed = Replayed(network, CountedPass)
    for _ in range(2):
        for count in range(1, RECORDINGS + 1):
            _gradients(replayed, network, *torch.randn(WARM_UPS + 1, count, 3))
        network[0].requires_grad_(False)
    assert CountedPass.made == 2 * RECORDINGS


def test_networks_with_batchnorm_are_left_as_they_are_and_that_is_said(caplog):
    model = tiny_model()
    model.discriminative.network = nn.Sequential(nn.BatchNorm2d(3))
    replay_passes(model)
    assert not isinstance(model.discriminative.network.forward, Replayed)
    assert isinstance(model.guide.network.forward, Replayed)
    assert "no effect on the passes of Sequential: it has BatchNorm" in caplog.text


def test_on_the_cpu_a_model_that_may_replay_does_as_before():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    plain, model = tiny_classifier(), tiny_classifier()
    replay_passes(model)
    for _ in range(WARM_UPS + 2):
        assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize("settings", [ADAMW, MOMENTUM])
def test_copies_of_weights_follow_the_optimizer(settings, network):
    weights = list(network.parameters())
    copies = Copies([each.detach().bfloat16() for each in weights], weights)
    optimizer = settings.build(network)
    for _ in range(2):
        _step(network, optimizer)
        copies.refresh()
        for copy, weight in copies._pairs:
            assert torch.equal(copy, weight.bfloat16())


def test_copies_of_weights_follow_what_is_put_back(network):
    weights = list(network.parameters())
    source = [each.detach().clone() for each in weights]
    copies = Copies([each.detach().bfloat16() for each in weights], weights)
    _step(network, ADAMW.build(network))
    copies.refresh()
    with torch.no_grad():
        for weight, before in zip(weights, source, strict=True):
            weight.copy_(before)
    copies.refresh()
    for (copy, _), before in zip(copies._pairs, source, strict=True):
        assert torch.equal(copy, before.bfloat16())


def _step(network, optimizer):
    network(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _trained(network, *, precision, device):
    """Two passes a step, and its optimizer's; the loss of the last step lives as long as this."""
    generator = torch.Generator().manual_seed(0)
    optimizer = ADAMW.build(network)
    for _ in range(WARM_UPS + 3):
        for image in torch.randn(2, 2, 3, 8, 8, generator=generator).to(device):
            with torch.autocast(device, precision, enabled=precision != torch.float32):
                loss = network(image).float().square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [each.detach() for each in network.parameters()]


def _small(device):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(288), nn.Linear(288, 4)
    return nn.Sequential(*layers).to(device)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_recorded_pass_follows_inputs_and_weights(precision, monkeypatch):
    graphs_on_cpu.imitate(monkeypatch)
    plain, network = _small("cpu"), _small("cpu")
    network.forward = Replayed(network, RecordedPass)
    found = _trained(network, precision=precision, device="cpu")
    assert len(network.forward._passes) == 1
    # The same operations on the same numbers.
    torch.testing.assert_close(found, _trained(plain, precision=precision, device="cpu"))


def test_a_whole_adaptation_with_recorded_passes_is_that_without(monkeypatch, tmp_path):
    graphs_on_cpu.imitate(monkeypatch)
    networks = []

    def dusa(model, *, recorded):
        for network in (model.discriminative.network, model.guide.network) if recorded else ():
            network.forward = Replayed(network, RecordedPass)
            networks.append(network)
        return Dusa(model=model, step="image")

    found = []
    for recorded in (False, True):
        method = partial(dusa, recorded=recorded)
        # Three steps of four batches, the last of them of other sizes.
        options = {"count": 21, "batch": 2, "accumulate": 4}
        module, result = adapt_images(method, tmp_path / str(recorded), **options)
        found.append((module.model.state_dict(), result))
    assert [len(each.forward._passes) for each in networks] == [1, 1]
    # The same operations on the same numbers.
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert found[1][1].loss == pytest.approx(found[0][1].loss, rel=1e-5)


@needs_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_recorded_pass_on_cuda_follows_inputs_and_weights(precision):
    plain, network = _small("cuda"), _small("cuda")
    network.forward = Replayed(network)
    found = _trained(network, precision=precision, device="cuda")
    assert len(network.forward._passes) == 1
    # The same kernels; sums over the device may be of another order, and AdamW divides by roots.
    torch.testing.assert_close(
        found, _trained(plain, precision=precision, device="cuda"), rtol=1e-3, atol=1e-4
    )
