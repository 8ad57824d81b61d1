import copy

import pytest
import torch

from segmill.errors import SegmillError
from segmill.tta.strong_jitter import strongly_jittered
from tiny_classifiers import (
    BATCHES,
    CLASSIFIERS,
    CLOSE,
    LayerNormClassifier,
    adapt_to_batches,
    batch_statistics_on,
    check_same_weights,
)
from tiny_methods import (
    VIEWS,
    LayerNormNet,
    TorchUpdater,
    method_of,
    optimizer_of,
    tiny_combined,
    weights_of,
)

FEW = {"copies": 3, "momentum": 0.5, "restore": 0.3}


def reference(student, *, lr, threshold, symmetric):
    """CoTTA as its classification code, with three models; also which batches were jittered."""
    batch_statistics_on(student.discriminative.network)
    source, teacher = copy.deepcopy(student), copy.deepcopy(student)
    weights = list(student.discriminative.network.parameters())
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9)
    generator, predictions, jittered = torch.Generator().manual_seed(0), [], []
    for views in BATCHES:
        with torch.no_grad():
            confidence = source(views.image).softmax(1).amax(1).mean()
            jittered.append(bool(confidence < threshold))
            label = teacher(views.image)
            if jittered[-1]:
                copies = [strongly_jittered(views.image, generator) for _ in range(3)]
                label = torch.stack([teacher(each) for each in copies]).mean(0)
        predictions.append(label)
        logits = student(views.image)
        loss = -(label.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        if symmetric:
            loss = 0.5 * loss - 0.5 * (logits.softmax(1) * label.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            trio = (source.parameters(), teacher.parameters(), student.parameters())
            for original, slow, weight in zip(*trio, strict=True):
                slow.copy_(0.5 * slow + 0.5 * weight)
                mask = torch.rand(weight.shape, generator=generator) < 0.3
                weight.copy_(original * mask + weight * ~mask)
    return student, teacher, predictions, jittered


def middling(model):
    """A threshold that some of the batches pass."""
    model = copy.deepcopy(model)
    batch_statistics_on(model.discriminative.network)
    with torch.no_grad():
        sure = [float(model(views.image).softmax(1).amax(1).mean()) for views in BATCHES]
    return sum(sorted(sure)[1:3]) / 2


@pytest.mark.parametrize("network", CLASSIFIERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_student_and_predictions_are_those_of_three_models(network, symmetric):
    model = tiny_combined(network)
    before = weights_of(model.discriminative.network)
    threshold = middling(model)
    student, _, predictions, jittered = reference(
        copy.deepcopy(model), lr=0.02, threshold=threshold, symmetric=symmetric
    )
    assert 0 < sum(jittered) < 4
    method = method_of(
        "cotta_classification", model, **FEW, threshold=threshold, symmetric=symmetric
    )
    logits, losses, _ = adapt_to_batches(method, lr=0.02, batch_statistics=True)
    torch.testing.assert_close(torch.cat(logits), torch.cat(predictions), **CLOSE)
    assert all(each > 0 for each in losses)
    check_same_weights(model.discriminative.network, student.discriminative.network, before)


def test_predictions_are_the_teachers():
    model = tiny_combined(LayerNormClassifier)
    _, teacher, _, _ = reference(copy.deepcopy(model), lr=0.02, threshold=0.0, symmetric=True)
    method = method_of("cotta_classification", model, **FEW, threshold=0.0)
    adapt_to_batches(method, lr=0.02)
    found = method.predict(BATCHES[0])
    torch.testing.assert_close(found, teacher(BATCHES[0].image).detach(), **CLOSE)


def test_segmentation_is_refused_by_name():
    method = method_of("cotta_classification", tiny_combined(LayerNormNet))
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    with pytest.raises(SegmillError, match=r"for segmentation is tta=cotta\."):
        method.adapt(VIEWS[0], updater, torch.Generator())
