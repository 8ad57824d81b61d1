import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from segmill.errors import SegmillError
from segmill.tta.augmix import augmix_copies
from segmill.tta.memo import marginal_entropy
from tiny_adapt import tiny_views
from tiny_classifiers import (
    BATCHES,
    CLASSIFIERS,
    CLOSE,
    BatchNormClassifier,
    LayerNormClassifier,
    adapt_to_batches,
)
from tiny_methods import (
    VIEWS,
    BatchNormNet,
    LayerNormNet,
    TorchUpdater,
    adapt_to_all,
    method_of,
    optimizer_of,
    tiny_combined,
)

SMALL = {"copies": 6}


def with_prior(model, strength=16):
    """BatchNorm by the paper's equation for one test point, forward by forward."""

    def normalise(layer, inputs, _):
        (values,) = inputs
        mean, var = layer.running_mean, layer.running_var
        if values.numel() > values.shape[1]:
            own = values.detach()
            mean = (strength * mean + own.mean(dim=(0, 2, 3))) / (strength + 1)
            var = (strength * var + own.var(dim=(0, 2, 3), unbiased=True)) / (strength + 1)
        return F.batch_norm(values, mean, var, layer.weight, layer.bias, eps=layer.eps)

    for each in model.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.register_forward_hook(normalise)
    return model


def reference(model, *, lr, batches, aligned=False):
    """The paper's algorithm 1 on a copy of the model for every image."""
    generator, results, losses = torch.Generator().manual_seed(0), [], []
    for views in batches:
        for image in views.image:
            own = with_prior(copy.deepcopy(model))
            weights = list(own.discriminative.network.parameters())
            copies, mirrored = augmix_copies(image, 6, generator, aligned=aligned)
            prob = own(copies).softmax(1)
            prob = torch.stack(
                [
                    each.flip(2) if turned else each
                    for each, turned in zip(prob, mirrored, strict=True)
                ]
            )
            loss = Categorical(probs=prob.mean(0).movedim(0, -1)).entropy().mean()
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.data -= lr * gradient
            results.append(own(image[None]).detach())
            losses.append(loss.detach())
    return results, losses


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_predictions_are_those_of_the_papers_algorithm(network):
    model = tiny_combined(network)
    expected, losses = reference(copy.deepcopy(model), lr=0.005, batches=BATCHES)
    source = [with_prior(copy.deepcopy(model))(views.image[:1]) for views in BATCHES]
    logits, found, updater = adapt_to_batches(method_of("memo", model, **SMALL), lr=0.005)
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), **CLOSE)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses).view(4, 4).mean(1), **CLOSE)
    assert max((a[:1] - b).abs().max() for a, b in zip(logits, source, strict=True)) > 1e-3
    assert updater.steps == 16
    assert not updater.optimizer.state


@pytest.mark.parametrize("network", [BatchNormNet, LayerNormNet])
def test_segmentation_asks_the_same_of_every_pixel_of_aligned_copies(network):
    model = tiny_combined(network)
    expected, losses = reference(copy.deepcopy(model), lr=0.05, batches=VIEWS, aligned=True)
    method = method_of("memo", model, **SMALL)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    logits, found = adapt_to_all(method, updater)
    for each, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(each, wanted, **CLOSE)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), **CLOSE)


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_copies_in_parts_give_the_step_of_all_at_once(network):
    """By the stored statistics; those of a part would be others."""
    settings = {"copies": 6, "prior_strength": None}
    whole, _, _ = adapt_to_batches(method_of("memo", tiny_combined(network), **settings), lr=0.005)
    parts, _, _ = adapt_to_batches(
        method_of("memo", tiny_combined(network), **settings, copies_at_once=4), lr=0.005
    )
    torch.testing.assert_close(torch.cat(parts), torch.cat(whole), **CLOSE)


def test_predict_says_of_the_same_images_what_adapt_said():
    model = tiny_combined(LayerNormClassifier)
    method = method_of("memo", model, **SMALL)
    logits, _, _ = adapt_to_batches(method)
    assert torch.equal(method.predict(BATCHES[-1]), logits[-1])
    assert not torch.equal(method.predict(BATCHES[0]), logits[0])
    method.reset()
    assert not torch.equal(method.predict(BATCHES[-1]), logits[-1])


def test_one_image_of_a_batch_has_no_part_in_the_others():
    model = tiny_combined(BatchNormClassifier)
    method = method_of("memo", model, **SMALL)
    together = method.predict(BATCHES[0])
    torch.testing.assert_close(
        together[:1], with_prior(model)(BATCHES[0].image[:1]).detach(), **CLOSE
    )


def test_copies_that_agree_and_are_sure_have_no_entropy():
    sure = torch.zeros(4, 5, 1, 1)
    sure[:, 2] = 1000.0
    assert marginal_entropy(sure) == 0
    apart = torch.zeros(2, 5, 1, 1)
    apart[0, 2], apart[1, 3] = 1000.0, 1000.0
    assert marginal_entropy(apart).item() == pytest.approx(np.log(2))


IMAGE = tiny_views(32, 48, seed=4).image[0]


def copies_of(image, *, aligned, seed=0):
    return augmix_copies(image, 40, torch.Generator().manual_seed(seed), aligned=aligned)


@pytest.mark.parametrize("aligned", [True, False])
def test_copies_have_the_images_size_and_range(aligned):
    copies, mirrored = copies_of(IMAGE, aligned=aligned)
    assert copies.shape == (40, *IMAGE.shape)
    assert copies.min() >= 0
    assert copies.max() <= 255.01  # shares that add up to 1 but for rounding
    assert 0 < mirrored.sum() < 40
    assert len({each.sum().item() for each in copies}) > 30


def test_the_pixels_of_aligned_copies_stay_in_place():
    """Patches of one colour stay patches of one colour, once mirror images are turned back."""
    copies, mirrored = copies_of(IMAGE, aligned=True)
    back = torch.where(mirrored.view(-1, 1, 1, 1), copies.flip(3), copies)
    patches = back.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
    assert (patches.amax(4) - patches.amin(4)).max() < 1e-3


def test_depth_is_mirrored_and_nothing_else():
    image = torch.cat([IMAGE, IMAGE[:1]])
    copies, mirrored = copies_of(image, aligned=True)
    for each, turned in zip(copies, mirrored, strict=True):
        assert torch.equal(each[3], (image[3].flip(1) if turned else image[3]).float())
    with pytest.raises(SegmillError, match="4 channels"):
        copies_of(image, aligned=False)


@pytest.mark.parametrize("settings", [{"copies": 0}, {"copies_at_once": 0}, {"prior_strength": -1}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(SegmillError, match=r"should be above 0"):
        method_of("memo", tiny_combined(LayerNormClassifier), **settings)
