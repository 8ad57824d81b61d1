import torch

from tiny_methods import VIEWS, BatchNormNet, adapted, tiny_combined, weights_of


def test_logits_are_the_models_and_nothing_changes():
    model = tiny_combined(BatchNormNet)
    before = weights_of(model)
    method, logits, losses = adapted("source", model)
    assert method.parameters_to_update() == {}
    for each, views in zip(logits, VIEWS, strict=True):
        assert torch.equal(each, model(views.image))
        assert torch.equal(each, method.predict(views))
        assert not each.requires_grad
    assert losses == [0, 0, 0]
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
