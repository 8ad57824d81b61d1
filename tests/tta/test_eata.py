import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from segmill.errors import SegmillError
from segmill.tta.fisher import Fisher
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
from tiny_methods import (
    VIEWS,
    LayerNormNet,
    TorchUpdater,
    adapted,
    method_of,
    optimizer_of,
    tiny_combined,
    weights_of,
)

# Five classes: more is reliable and less redundant than of a thousand.
LOOSE = {"entropy_share": 0.7, "redundancy": 0.9}
MARGIN = 0.7 * math.log(5)


def reference(model, *, lr, fisher=None):
    """EATA as in the paper's equations 3 to 8, an image being a sample; also how many counted."""
    network = model.discriminative.network
    batch_statistics_on(network)
    weights = norm_weights(network)
    source = [each.detach().clone() for each in weights]
    velocity = [torch.zeros_like(each) for each in weights]
    squares, average, counted = None, None, []
    for number, views in enumerate(BATCHES):
        logits = model(views.image).flatten(1)
        if fisher is not None and number < fisher["batches"]:
            loss = F.cross_entropy(logits, logits.argmax(dim=1))
            squares = squares or [torch.zeros_like(each) for each in weights]
            for each, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                each += gradient**2 / fisher["batches"]
            continue
        entropy, prob = Categorical(logits=logits).entropy(), logits.softmax(1).detach()
        chosen = entropy < MARGIN
        if average is not None:
            chosen = chosen & (F.cosine_similarity(prob, average[None]) < 0.9)
        counted.append(int(chosen.sum()))
        if not chosen.any():
            continue
        loss = (entropy * (MARGIN - entropy).exp().detach())[chosen].mean()
        if squares is not None:
            for each, square, start in zip(weights, squares, source, strict=True):
                loss = loss + fisher["strength"] * (square * (each - start) ** 2).sum()
        momentum_step(weights, torch.autograd.grad(loss, weights), velocity, lr)
        mean = prob[chosen].mean(0)
        average = mean if average is None else 0.9 * average + 0.1 * mean
    return network, counted


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_weights_are_those_of_the_papers_equations(network):
    model = tiny_combined(network)
    before = weights_of(model.discriminative.network)
    expected, counted = reference(copy.deepcopy(model), lr=0.05)
    assert any(0 < each < 4 for each in counted[1:])
    adapt_to_batches(method_of("eata", model, **LOOSE), batch_statistics=True)
    check_same_weights(model.discriminative.network, expected, before)


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_the_fisher_penalty_is_the_papers(network):
    """Of the first eight images, by which nothing is learnt."""
    model = tiny_combined(network)
    before = weights_of(model.discriminative.network)
    fisher = {"batches": 2, "strength": 20.0}
    expected, _ = reference(copy.deepcopy(model), lr=0.05, fisher=fisher)
    plain, _ = reference(copy.deepcopy(model), lr=0.05, fisher=fisher | {"strength": 0.0})
    setting = {"_target_": "segmill.tta.fisher.Fisher", "images": 8, "strength": 20.0}
    method = method_of("eata", model, **LOOSE, fisher=setting)
    _, _, updater = adapt_to_batches(method, batch_statistics=True)
    assert 1 < updater.steps <= 2
    check_same_weights(model.discriminative.network, expected, before)
    difference = max(
        (a - b).abs().max() for a, b in zip(expected.parameters(), plain.parameters(), strict=True)
    )
    assert difference > 1e-3, "the penalty is felt"


def test_a_batch_of_which_nothing_is_reliable_changes_nothing():
    model = tiny_combined(LayerNormClassifier, sharpness=0.01)
    before = weights_of(model)
    _, losses, updater = adapt_to_batches(method_of("eata", model, **LOOSE))
    assert losses == [0, 0, 0, 0]
    assert updater.steps == 0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_what_was_seen_before_is_redundant():
    model = tiny_combined(LayerNormClassifier)
    method = method_of("eata", model, entropy_share=1.0, redundancy=0.05)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    losses = [float(method.adapt(BATCHES[0], updater, torch.Generator())[1]) for _ in range(2)]
    assert losses[0] > 0
    assert losses[1] == 0
    assert updater.steps == 1


def test_surer_images_count_more():
    model = tiny_combined(LayerNormClassifier)
    entropy = Categorical(logits=model(BATCHES[0].image).flatten(1)).entropy()
    chosen = entropy[entropy < MARGIN].detach()
    _, losses, _ = adapt_to_batches(method_of("eata", model, **LOOSE))
    expected = (chosen * (MARGIN - chosen).exp()).mean()
    torch.testing.assert_close(losses[0], expected, **CLOSE)


def test_a_pixel_is_a_sample_for_segmentation():
    model = tiny_combined(LayerNormNet)
    entropy = Categorical(logits=model(VIEWS[0].image).movedim(1, -1)).entropy().detach()
    chosen = entropy[entropy < MARGIN]
    assert 1 < len(chosen) < entropy.numel()
    _, _, losses = adapted("eata", model, **LOOSE)
    torch.testing.assert_close(losses[0], (chosen * (MARGIN - chosen).exp()).mean(), **CLOSE)


def test_after_reset_fisher_is_gathered_anew():
    fisher = Fisher(images=2, strength=1.0)
    fisher.gather({}, images=4)
    assert not fisher.gathers
    fisher.reset()
    assert fisher.gathers


@pytest.mark.parametrize("values", [{"images": 0, "strength": 1.0}, {"images": 4, "strength": 0.0}])
def test_a_penalty_of_nothing_is_refused(values):
    with pytest.raises(SegmillError, match=r"fisher=null leaves the penalty out"):
        Fisher(**values)
