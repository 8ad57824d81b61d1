import copy
import math

import pytest
import torch
from torch import nn

from segmill.errors import SegmillError
from segmill.tta.class_memory import ClassMemory
from segmill.tta.strong_jitter import strongly_jittered
from tiny_classifiers import (
    BATCHES,
    CLASSIFIERS,
    CLOSE,
    BatchNormClassifier,
    LayerNormClassifier,
    adapt_to_batches,
    momentum_step,
    norm_weights,
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

# Steps after images 3, 6, 9, 12 and 15; a memory that overflows.
SMALL = {"capacity": 5, "update_every": 3, "momentum": 0.6, "statistics_share": 0.3}


class RobustBatchNorm(nn.Module):
    """The paper's equation 3: the statistics move, and normalise, when `moves`."""

    def __init__(self, source):
        super().__init__()
        self.source, self.moves = source, False
        self.mean, self.var = source.running_mean.clone(), source.running_var.clone()

    def forward(self, values):
        mean, var = self.mean, self.var
        if self.moves and values.numel() > values.shape[1]:
            mean = 0.7 * mean + 0.3 * values.mean(dim=(0, 2, 3))
            var = 0.7 * var + 0.3 * values.var(dim=(0, 2, 3), unbiased=False)
            self.mean, self.var = mean.detach(), var.detach()
        normal = (values - mean[:, None, None]) / (var[:, None, None] + self.source.eps).sqrt()
        return normal * self.source.weight[:, None, None] + self.source.bias[:, None, None]


def robust(model):
    for name in ("first", "second", "pooled"):
        if isinstance(model.discriminative.network, BatchNormClassifier):
            part = getattr(model.discriminative.network, name)
            part[1] = RobustBatchNorm(part[1])
    return model


def let_move(model, moves):
    for each in model.modules():
        if isinstance(each, RobustBatchNorm):
            each.moves = moves


def remember(memory, image, predicted, entropy, *, capacity=5, classes=5):
    """Section 3.2 with a flat list of [image, class, entropy, age]."""

    def penalty(item):
        return 1 / (1 + math.exp(-item[3] / capacity)) + item[2] / math.log(classes)

    new = [image, predicted, entropy, 0]
    sizes = [sum(item[1] == each for item in memory) for each in range(classes)]
    places = None
    if sizes[predicted] >= capacity / classes:
        places = [predicted]
    elif len(memory) == capacity:
        places = [each for each in range(classes) if sizes[each] == max(sizes)]
    if places is None:
        memory.append(new)
    else:
        worst = max((item for item in memory if item[1] in places), key=penalty)
        if penalty(worst) > penalty(new):
            memory[:] = [item for item in memory if item is not worst]
            memory.append(new)
    for item in memory:
        item[3] += 1


def reference(student, *, lr):
    """RoTTA with two models; returns student, teacher, predictions and the sizes of the memory."""
    teacher = robust(copy.deepcopy(student))
    norms = norm_weights(student.discriminative.network)
    student = robust(student)
    teacher_norms = [
        other
        for own, other in zip(student.parameters(), teacher.parameters(), strict=True)
        if any(own is each for each in norms)
    ]
    student_norms = [each for each in student.parameters() if any(each is own for own in norms)]
    velocity = [torch.zeros_like(each) for each in student_norms]
    generator, memory, predictions, seen, sizes = torch.Generator().manual_seed(0), [], [], 0, []
    for views in BATCHES:
        with torch.no_grad():
            logits = teacher(views.image)
        predictions.append(logits)
        prob = logits.flatten(1).softmax(1)
        entropy = -(prob * prob.log()).sum(1)
        for index in range(len(prob)):
            image = views.image[index]
            remember(memory, image, int(prob[index].argmax()), float(entropy[index]))
            seen += 1
            if seen % 3:
                continue
            items = sorted(memory, key=lambda item: item[1])
            sizes.append(len(items))
            images = torch.stack([item[0] for item in items])
            weights = torch.tensor([math.exp(-item[3] / 5) for item in items])
            for each in (student, teacher):
                let_move(each, moves=True)
            with torch.no_grad():
                labels = teacher(images).flatten(1).softmax(1)
            found = student(strongly_jittered(images, generator)).flatten(1).log_softmax(1)
            for each in (student, teacher):
                let_move(each, moves=False)
            loss = (-(labels * found).sum(1) * weights / (1 + weights)).mean()
            momentum_step(student_norms, torch.autograd.grad(loss, student_norms), velocity, lr)
            for slow, weight in zip(teacher_norms, student_norms, strict=True):
                slow.data.copy_(0.6 * slow.data + 0.4 * weight.data)
    return student, teacher, predictions, sizes


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_student_and_predictions_are_those_of_two_models(network):
    model = tiny_combined(network)
    expected = tiny_combined(network)
    weights = norm_weights(expected.discriminative.network)
    _, _, predictions, sizes = reference(expected, lr=0.05)
    assert max(sizes) > 2
    logits, losses, updater = adapt_to_batches(method_of("rotta", model, **SMALL))
    assert updater.steps == 5
    assert all(each > 0 for each in losses)
    for found, wanted in zip(logits, predictions, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    before = norm_weights(tiny_combined(network).discriminative.network)
    found = norm_weights(model.discriminative.network)
    for each, wanted in zip(found, weights, strict=True):
        torch.testing.assert_close(each, wanted, **CLOSE)
    assert max((a - b).abs().max() for a, b in zip(found, before, strict=True)) > 1e-3


def test_predictions_are_the_teachers_by_its_own_statistics():
    model = tiny_combined(BatchNormClassifier)
    _, teacher, _, _ = reference(tiny_combined(BatchNormClassifier), lr=0.05)
    method = method_of("rotta", model, **SMALL)
    adapt_to_batches(method)
    with torch.no_grad():
        expected = teacher(BATCHES[0].image)
    torch.testing.assert_close(method.predict(BATCHES[0]), expected, **CLOSE)


def test_images_of_segmentation_are_refused_by_name():
    model = tiny_combined(LayerNormNet)
    method = method_of("rotta", model)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    with pytest.raises(SegmillError, match=r"tta=rotta keeps images by the one class.*tta=cotta"):
        method.adapt(VIEWS[0], updater, torch.Generator())


def test_nothing_is_learnt_before_it_is_time():
    model = tiny_combined(LayerNormClassifier)
    before = weights_of(model)
    _, losses, updater = adapt_to_batches(method_of("rotta", model, update_every=17))
    assert losses == [0, 0, 0, 0]
    assert updater.steps == 0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def memory_of(*items, capacity=4, classes=2):
    memory = ClassMemory(capacity=capacity, num_classes=classes, age_weight=1.0, entropy_weight=1.0)
    for value, predicted, entropy in items:
        memory.add(torch.full((3, 1, 1), value, dtype=torch.uint8), predicted, entropy)
    return memory


def values_of(memory):
    return memory.content()[0][:, 0, 0, 0].tolist()


def test_a_class_has_no_more_than_its_share_of_the_memory():
    items = [(number, 0, 0.1) for number in range(6)]
    assert len(values_of(memory_of(*items))) == 2
    assert sorted(values_of(memory_of(*items, (6, 1, 0.1), (7, 1, 0.1), (8, 1, 0.1)))) == [
        4,
        5,
        7,
        8,
    ]


def test_an_unsure_image_does_not_take_the_place_of_a_sure_one():
    memory = memory_of((0, 0, 0.1), (1, 0, 0.1), (2, 0, 0.69))
    assert values_of(memory) == [0, 1]


def test_ages_are_in_units_of_the_capacity():
    images, ages = memory_of((0, 0, 0.1), (1, 1, 0.1), (2, 1, 0.1)).content()
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert ages.tolist() == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("key", ["capacity", "update_every"])
def test_sizes_of_nothing_are_refused(key):
    with pytest.raises(SegmillError, match=f"{key}=0"):
        method_of("rotta", tiny_combined(LayerNormClassifier), **{key: 0})


def test_the_generator_decides_what_is_jittered():
    image = BATCHES[0].image
    first, again, other = (
        strongly_jittered(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == image.shape
    assert first.min() >= 0
    assert first.max() <= 255


def test_jittered_images_are_still_the_images():
    """A large patch stays in place: the most it moves is an eighth of the side."""
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, 20:44, 20:44] = 255
    for seed in range(20):
        changed = strongly_jittered(image, torch.Generator().manual_seed(seed))
        assert changed[..., 30:34, 30:34].mean() > changed[..., :4, :4].mean() + 50
