import copy

import pytest
import torch

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel, Update
from segmill.models.discriminative import Discriminative
from segmill.models.generative.codec import PixelCodec
from segmill.models.generative.sit import SiTGuide
from segmill.models.generative.transformer import DiffusionTransformer
from segmill.models.guide_view import GuideView
from tiny_adapt import tiny_loss, tiny_model, tiny_views
from tiny_classifiers import (
    BATCHES,
    CLOSE,
    BatchNormClassifier,
    LayerNormClassifier,
    adapt_to_batches,
    momentum_step,
)
from tiny_methods import (
    CLASSES,
    LayerNormNet,
    TorchUpdater,
    method_of,
    optimizer_of,
    tiny_combined,
    weights_of,
)

SMALL = {"steps": 2, "draws": 6, "draws_at_once": 4, "topk": 3}
FEW = SMALL | {"steps": 1, "draws": 2}


def guided(network=LayerNormClassifier, *, generative=True, discriminative=True, **view):
    """A classifier and a SiT of three blocks that is not at its first zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformer = DiffusionTransformer(
            in_channels=3,
            channels=32,
            depth=2,
            num_heads=2,
            patch=2,
            mlp_ratio=2.0,
            num_classes=CLASSES,
            learn_sigma=False,
            qk_norm=False,
        )
        for parameter in transformer.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    sizes = {"short": 16, "window": None, "stride": None, "multiple": 8} | view
    guide = SiTGuide(
        network=transformer,
        codec=PixelCodec(factor=4, mean=0.0, std=1.0),
        view=GuideView(**sizes),
        path="linear",
        weights=None,
    )
    source = tiny_combined(network)
    model = CombinedModel(
        discriminative=source.discriminative,
        generative=guide,
        update=Update(discriminative=discriminative, generative=generative, update_norm_only=False),
        loss=tiny_loss(),
    )
    return model.eval()


def reference(model, *, lr, topk=3):
    """Image by image, step by step, all draws at once, on copies of the model."""
    generator, results, losses = torch.Generator().manual_seed(0), [], []
    for views in BATCHES:
        for image in views.image.split(1):
            own = copy.deepcopy(model)
            weights = list(own.parameters_to_update().values())
            velocity = [torch.zeros_like(each) for each in weights]
            latent = own.guide.encode(own.guide.view.windows(image))
            classes = own(image).flatten().topk(topk).indices
            for step in range(2):
                t = torch.rand(6, generator=generator)
                noise = torch.randn((6, *latent.shape[1:]), generator=generator)
                share = t[:, None, None, None]
                prob = own(image).flatten()[classes].softmax(0)
                table = own.guide.network.y_embedder.embedding_table.weight
                mixed = (prob[:, None] * table[classes]).sum(0)
                hook = own.guide.network.y_embedder.register_forward_hook(
                    lambda *_, mixed=mixed: mixed.expand(6, -1)
                )
                anything = torch.zeros(6, dtype=torch.int64)
                noisy = (1 - share) * latent + share * noise
                velocity_field = own.guide.network(noisy, t, anything)
                hook.remove()
                loss = ((velocity_field - (noise - latent)) ** 2).mean()
                gradients = torch.autograd.grad(
                    loss, weights, allow_unused=True, materialize_grads=True
                )
                momentum_step(weights, gradients, velocity, lr)
                if step == 0:
                    losses.append(loss.detach())
            results.append(own(image).detach())
    return torch.cat(results), torch.stack(losses)


@pytest.mark.parametrize(
    ("network", "generative"),
    [
        (LayerNormClassifier, True),
        (BatchNormClassifier, False),
        pytest.param(LayerNormClassifier, False, marks=pytest.mark.slow),
        pytest.param(BatchNormClassifier, True, marks=pytest.mark.slow),
    ],
)
def test_predictions_are_those_of_copies_that_adapt_to_one_image_each(network, generative):
    model = guided(network, generative=generative)
    expected, losses = reference(copy.deepcopy(model), lr=0.05)
    source = torch.cat([model(views.image).detach() for views in BATCHES])
    logits, found, updater = adapt_to_batches(method_of("diffusion_tta", model, **SMALL))
    torch.testing.assert_close(torch.cat(logits), expected, **CLOSE)
    assert (expected - source).abs().max() > 1e-3
    torch.testing.assert_close(torch.stack(found), losses.view(4, 4).mean(1), **CLOSE)
    assert updater.steps == 2 * 16
    assert not updater.optimizer.state


def test_the_weights_are_the_sources_again_bit_for_bit():
    model = guided()
    before = weights_of(model)
    adapt_to_batches(method_of("diffusion_tta", model, **FEW))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_predict_says_of_the_same_images_what_adapt_said():
    model = guided()
    method = method_of("diffusion_tta", model, **FEW)
    logits, _, _ = adapt_to_batches(method)
    assert torch.equal(method.predict(BATCHES[-1]), logits[-1])
    source = model(BATCHES[0].image)
    assert torch.equal(method.predict(BATCHES[0]), source)
    method.reset()
    assert not torch.equal(method.predict(BATCHES[-1]), logits[-1])


def test_the_generator_decides_what_is_drawn():
    runs = [
        torch.cat(adapt_to_batches(method_of("diffusion_tta", guided(), **FEW), seed=seed)[0])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def refused(model, match, **settings):
    with pytest.raises(SegmillError, match=match):
        adapt_to_batches(method_of("diffusion_tta", model, **SMALL | settings))


def test_segmentation_is_refused_by_name():
    refused(guided(LayerNormNet), r"one condition an image.*tta=dusa")


def test_a_guide_without_vectors_of_classes_is_refused_by_name():
    refused(tiny_model(), r"guide TinyGuide has no such vector")


def test_a_discriminative_model_that_learns_nothing_is_refused():
    refused(guided(discriminative=False), r"model\.update\.discriminative=false")


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"draws": 0}, {"topk": 0}, {"timestep_range": [0.5, 0.2]}]
)
def test_settings_that_cannot_be_are_refused(settings):
    refused(guided(), r"should be above 0", **settings)


def test_more_classes_than_there_are_are_refused_before_anything_runs():
    with pytest.raises(SegmillError, match=r"tta\.method\.topk=6, .* knows 5 classes"):
        method_of("diffusion_tta", guided(), **SMALL | {"topk": 6})


def test_an_image_of_several_windows_is_refused():
    model = guided(short=16, window=16, stride=8)
    method = method_of("diffusion_tta", model, **SMALL)
    updater = TorchUpdater(optimizer_of(method.parameters_to_update()))
    with pytest.raises(SegmillError, match=r"24 x 64 pixels into \d windows"):
        method.adapt(tiny_views(24, 64), updater, torch.Generator())


def test_classes_of_another_data_set_are_refused():
    model = guided()
    model.discriminative = Discriminative(
        network=torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(3, 9, 1)),
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    with pytest.raises(SegmillError, match=r"9 classes and model\.generative 5"):
        method_of("diffusion_tta", model, **SMALL)._check(model(BATCHES[0].image[:1]))
