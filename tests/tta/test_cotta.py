import copy

import pytest
import torch
import torch.nn.functional as F

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
)

NETWORKS = [BatchNormNet, LayerNormNet]
# Small images: 48 x 64 and 64 x 48 stay multiples of 8 at these sizes.
FEW = {"ratios": [0.5, 1.0, 1.5], "multiple": 8, "momentum": 0.5, "restore": 0.3}
# float32; the average over views is summed in another order.
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def prob_of(model, image, size):
    logits = F.interpolate(model(image), size, mode="bilinear", align_corners=False)
    return logits.softmax(dim=1)


def labels(source, teacher, image, threshold):
    """Pseudo-labels and the teacher's probabilities, with whole copies of the model."""
    size = tuple(source(image).shape[2:])
    views = []
    for ratio in FEW["ratios"]:
        height, width = (int(side * ratio) for side in image.shape[2:])
        scaled = F.interpolate(image.float(), (height, width), mode="bilinear", align_corners=False)
        views.append(prob_of(teacher, scaled, size))
        views.append(prob_of(teacher, scaled.flip(3), size).flip(3))
    sure = source(image).softmax(dim=1).amax(dim=1, keepdim=True) > threshold
    assert 0.05 < sure.float().mean() < 0.95
    return torch.where(sure, teacher(image).softmax(dim=1), sum(views) / len(views))


def reference(student, *, lr, threshold=0.69):
    """CoTTA as its segmentation code, with three models; returns student, teacher, predictions."""
    source, teacher = copy.deepcopy(student), copy.deepcopy(student)
    weights = dict(student.discriminative.network.named_parameters())
    optimizer = torch.optim.SGD(weights.values(), lr=lr, momentum=0.9)
    generator, predictions = torch.Generator().manual_seed(0), []
    for views in VIEWS:
        with torch.no_grad():
            prob = labels(source, teacher, views.image, threshold)
        predictions.append(prob)
        loss = F.cross_entropy(student(views.image), prob.argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            trio = (source.parameters(), teacher.parameters(), student.parameters())
            for original, slow, weight in zip(*trio, strict=True):
                slow.copy_(0.5 * slow + 0.5 * weight)
                mask = torch.rand(weight.shape, generator=generator) < 0.3
                weight.copy_(original * mask + weight * ~mask)
    return student, teacher, predictions


@pytest.mark.parametrize("network", NETWORKS)
def test_student_and_predictions_are_those_of_three_models(network):
    model = tiny_combined(network)
    before = copy.deepcopy(dict(model.named_parameters()))
    student, _, predictions = reference(copy.deepcopy(model), lr=0.05)
    _, logits, _ = adapted("cotta", model, **FEW)
    for found, prob in zip(logits, predictions, strict=True):
        torch.testing.assert_close(found.exp(), prob, **CLOSE)
    for (name, found), expected in zip(model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
        assert (found - before[name]).abs().max() > 1e-4, "every weight learns"


def test_predictions_are_the_teachers_not_the_students():
    model = tiny_combined(LayerNormNet)
    _, teacher, _ = reference(copy.deepcopy(model), lr=0.05)
    method, _, _ = adapted("cotta", model, **FEW)
    source = tiny_combined(LayerNormNet)
    for views in VIEWS:
        with torch.no_grad():
            expected = labels(source, teacher, views.image, 0.69)
        torch.testing.assert_close(method.predict(views).exp(), expected, **CLOSE)


def test_the_teacher_moves_by_its_momentum():
    model = tiny_combined(LayerNormNet)
    still, _, _ = adapted("cotta", model, **FEW | {"momentum": 1.0})
    first = method_of("cotta", tiny_combined(LayerNormNet), **FEW).predict(VIEWS[0])
    torch.testing.assert_close(still.predict(VIEWS[0]), first, atol=0, rtol=0)
    moving, _, _ = adapted("cotta", tiny_combined(LayerNormNet), **FEW | {"momentum": 0.99})
    difference = (moving.predict(VIEWS[0]) - first).abs().max()
    faster, _, _ = adapted("cotta", tiny_combined(LayerNormNet), **FEW | {"momentum": 0.9})
    assert 0 < difference < (faster.predict(VIEWS[0]) - first).abs().max()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_share_of_the_weights_returns_to_the_source(share):
    model = tiny_combined(BatchNormNet)
    before = torch.cat([each.detach().flatten() for each in model.parameters()])
    method = method_of("cotta", model, **FEW | {"restore": share})
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    method.adapt(VIEWS[0], updater, torch.Generator().manual_seed(0))
    after = torch.cat([each.detach().flatten() for each in model.parameters()])
    # 700 weights: four standard deviations of a share of 0.3 are 0.07.
    assert (after == before).float().mean().item() == pytest.approx(share, abs=0.07 * (share < 1))


def test_the_student_is_left_with_its_own_weights_by_predict():
    model = tiny_combined(BatchNormNet)
    method, _, _ = adapted("cotta", model, **FEW)
    before = copy.deepcopy(model.state_dict())
    method.predict(VIEWS[0])
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_views_are_as_large_as_the_networks_multiple_asks():
    model = tiny_combined(LayerNormNet)
    sizes = []
    model.discriminative.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    method_of("cotta", model, multiple=16, ratios=[1.0, 1.1], flip=False).predict(VIEWS[0])
    assert [tuple(size) for size in sizes] == [(1, 3, 48, 64), (1, 3, 48, 64), (1, 3, 64, 80)]


def test_probabilities_that_vanish_can_still_be_resized():
    model = tiny_combined(LayerNormNet, sharpness=1e6)
    assert method_of("cotta", model, **FEW).predict(VIEWS[0]).isfinite().all()


def test_ratios_without_the_image_itself_are_refused():
    with pytest.raises(SegmillError, match=r"ratios=\[0\.5, 2\.0\]"):
        method_of("cotta", tiny_combined(LayerNormNet), ratios=[0.5, 2.0])
