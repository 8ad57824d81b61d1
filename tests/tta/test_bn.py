import logging

import torch
from torch.nn.functional import batch_norm

from tiny_methods import (
    VIEWS,
    BatchNormNet,
    LayerNormNet,
    adapted,
    method_of,
    tiny_combined,
    weights_of,
)


def reference(model, image):
    """The first two BatchNorms by the image; the third sees one value a channel."""
    network = model.discriminative.network
    values = model.discriminative.normalise(image)
    for convolve, norm, relu in (network.first, network.second):
        values = relu(batch_norm(convolve(values), None, None, norm.weight, norm.bias, True))
    return network.classify(values + network.pooled(values))


def test_each_image_is_normalised_by_itself_and_nothing_changes():
    model = tiny_combined(BatchNormNet)
    before = weights_of(model)
    method, logits, losses = adapted("bn", model, batch_statistics=True)
    assert method.parameters_to_update() == {}
    for each, views in zip(logits, VIEWS, strict=True):
        # The same operations in the same order.
        torch.testing.assert_close(each, reference(model, views.image), atol=0, rtol=0)
        assert not torch.equal(each, model(views.image))
    assert losses == [0, 0, 0]
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_model_without_batchnorm_is_said_to_stay_the_source(caplog):
    with caplog.at_level(logging.WARNING):
        method_of("bn", tiny_combined(LayerNormNet))
    assert "LayerNormNet has no BatchNorm layer" in caplog.text
    caplog.clear()
    method_of("bn", tiny_combined(BatchNormNet))
    assert caplog.text == ""
