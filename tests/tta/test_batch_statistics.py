import copy

import pytest
import torch
from torch import nn

from segmill.tta.batch_statistics import BatchStatistics
from tiny_methods import VIEWS, BatchNormNet, LayerNormNet, tiny_combined, weights_of

IMAGE = VIEWS[0].image


def test_layers_normalise_as_in_train_mode_but_stay_in_eval_mode():
    model = tiny_combined(BatchNormNet)
    trained = copy.deepcopy(model)
    for layer in (trained.discriminative.network.first, trained.discriminative.network.second):
        layer.train()
    expected = trained(IMAGE)
    assert not torch.equal(model(IMAGE), expected)
    BatchStatistics(model).apply()
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda each, _: seen.append(each.training))
    # The same operations in the same order.
    torch.testing.assert_close(model(IMAGE), expected, atol=0, rtol=0)
    assert seen
    assert not any(seen)


def test_a_single_value_a_channel_is_normalised_by_the_stored_statistics():
    model = tiny_combined(BatchNormNet)
    layer = model.discriminative.network.pooled[1]
    pooled = torch.rand(1, 7, 1, 1)
    expected = layer(pooled)
    statistics = BatchStatistics(model)
    statistics.apply()
    assert torch.equal(layer(pooled), expected)


def test_gradients_go_through_the_statistics():
    layer = nn.BatchNorm2d(2).eval()
    BatchStatistics(layer).apply()
    values = torch.rand(1, 2, 3, 3, requires_grad=True)
    layer(values)[0, 0, 0, 0].backward()
    assert values.grad is not None
    assert values.grad[0, 0, 2, 2] != 0


def test_undo_leaves_the_very_buffers_and_the_very_outputs():
    model = tiny_combined(BatchNormNet)
    logits, before = model(IMAGE), weights_of(model)
    buffers = dict(model.named_buffers())
    statistics = BatchStatistics(model)
    statistics.apply()
    model(IMAGE)
    while_applied = weights_of(model)
    statistics.undo()
    assert torch.equal(model(IMAGE), logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(while_applied[name], before[name])
    assert all(each is buffers[name] for name, each in model.named_buffers())


def test_a_forward_that_fails_leaves_the_statistics_in_place():
    layer = nn.BatchNorm2d(2).eval()
    BatchStatistics(layer).apply()
    with pytest.raises(ValueError, match="4D"):
        layer(torch.rand(1, 2, 3))
    assert layer.running_mean is not None
    assert layer.running_var is not None


def test_it_can_be_applied_undone_and_applied():
    model = tiny_combined(BatchNormNet)
    statistics = BatchStatistics(model)
    statistics.apply()
    first = model(IMAGE)
    statistics.undo()
    statistics.apply()
    assert torch.equal(model(IMAGE), first)


def test_a_model_without_batchnorm_stays_as_it_is():
    model = tiny_combined(LayerNormNet)
    logits = model(IMAGE)
    BatchStatistics(model).apply()
    assert torch.equal(model(IMAGE), logits)
