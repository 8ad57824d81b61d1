import pytest
import torch
from timm.layers.norm import RmsNorm
from torch import nn

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel, Update
from tiny_adapt import tiny_loss, tiny_model, tiny_views

GUIDE_NORMS = {"generative.network.norm.weight", "generative.network.norm.bias"}
OWN_NORMS = {"discriminative.network.norm.weight", "discriminative.network.norm.bias"}


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ((True, True, True), OWN_NORMS | GUIDE_NORMS),
        ((True, False, True), OWN_NORMS),
        ((False, True, True), GUIDE_NORMS),
        ((False, False, False), set()),
        ((False, False, True), set()),
    ],
)
def test_update_chooses_norm_layers_by_part(update, expected):
    model = tiny_model(update=update)
    assert set(model.parameters_to_update()) == expected
    assert model.updates_discriminative == update[0]
    assert model.updates_generative == update[1]


def test_update_of_both_takes_every_weight_of_both_networks():
    model = tiny_model()
    assert model.parameters_to_update() == dict(model.named_parameters())


def test_update_may_be_exchanged_and_does_not_depend_on_what_is_frozen_meanwhile():
    model = tiny_model(update=(True, False, True))
    model.requires_grad_(False)
    model.update = Update(discriminative=False, generative=True, update_norm_only=False)
    names = set(model.parameters_to_update())
    assert names == {
        f"generative.network.{name}" for name, _ in model.guide.network.named_parameters()
    }


def test_weights_that_were_frozen_from_the_start_are_never_updated():
    tiny = tiny_model()
    tiny.guide.network.get_parameter("time.bias").requires_grad_(False)
    model = CombinedModel(
        discriminative=tiny.discriminative,
        generative=tiny.guide,
        update=tiny.update,
        loss=tiny.loss,
    )
    assert "generative.network.time.bias" not in model.parameters_to_update()


def test_norm_layers_are_known_by_type_not_by_name():
    class RMSNorm(nn.Module):  # as diffusers has its own
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

    class AdaptiveNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6, elementwise_affine=False)
            self.linear = nn.Linear(4, 12)

    tiny = tiny_model(update=(True, False, True))
    for name, layer in {
        "query": RMSNorm(),
        "key": nn.RMSNorm(6),
        "value": RmsNorm(6),
        "adaptive_norm": AdaptiveNorm(),
        "batch": nn.BatchNorm2d(6),
    }.items():
        tiny.discriminative.network.add_module(name, layer)
    model = CombinedModel(
        discriminative=tiny.discriminative, generative=None, update=tiny.update, loss=tiny.loss
    )
    affine = {f"{layer}.{name}" for layer in ("norm", "batch") for name in ("weight", "bias")}
    expected = affine | {"query.weight", "key.weight", "value.weight"}
    assert set(model.parameters_to_update()) == {f"discriminative.network.{x}" for x in expected}


def test_an_update_that_finds_no_weights_is_refused_with_its_keys():
    model = tiny_model(update=(True, False, True))
    model.discriminative.network.norm = nn.Identity()
    model = CombinedModel(
        discriminative=model.discriminative, generative=None, update=model.update, loss=model.loss
    )
    with pytest.raises(SegmillError, match=r"model\.update\.update_norm_only"):
        model.parameters_to_update()


def test_a_guide_without_norm_weights_is_warned_of(caplog):
    tiny = tiny_model(update=(True, True, True))
    tiny.guide.network.norm = nn.Identity()
    model = CombinedModel(
        discriminative=tiny.discriminative,
        generative=tiny.guide,
        update=tiny.update,
        loss=tiny.loss,
    )
    model.check_guided()
    assert "model.update.generative=true has no effect" in caplog.text
    assert not model.updates_generative


def test_without_a_guide_the_rest_works_and_the_guide_is_asked_for_by_its_key():
    tiny = tiny_model()
    model = CombinedModel(
        discriminative=tiny.discriminative, generative=None, update=tiny.update, loss=tiny.loss
    )
    assert all(name.startswith("discriminative.") for name in model.parameters_to_update())
    with pytest.raises(SegmillError, match=r"model/generative=NAME"):
        model.check_guided()


def test_more_top_classes_than_there_are_are_refused():
    with pytest.raises(SegmillError, match=r"model\.loss\.topk=8"):
        tiny_model(topk=8).check_guided()


def test_models_for_different_classes_are_refused():
    model = tiny_model()
    views, generator = tiny_views(), torch.Generator()
    noisy = model.noisy_windows(views.original, generator)
    with pytest.raises(SegmillError, match=r"5 classes and model\.generative 7"):
        model.weighted_windows(torch.rand(1, 5, 10, 17), noisy, generator)


def test_windows_have_noise_of_their_own_from_the_generator():
    model = tiny_model(timestep_range=(0.1, 0.9))
    views = tiny_views(40, 88)

    def draw(seed: int):
        return model.noisy_windows(views.original, torch.Generator().manual_seed(seed))

    first, again, other = draw(0), draw(0), draw(1)
    assert first.noisy_latent.shape == (4, 3, 4, 4)
    assert first.size == (32, 70)
    assert torch.equal(first.noisy_latent, again.noisy_latent)
    assert not torch.equal(first.noisy_latent, other.noisy_latent)
    assert len(set(first.t.tolist())) == 4
    share = first.t[:, None, None, None]
    latent = model.guide.encode(model.guide.view.windows(views.original))
    torch.testing.assert_close(first.noisy_latent, latent + share * first.target)


def test_a_part_of_the_windows_has_no_more_classes_than_it_needs():
    model = tiny_model(topk=2)
    views, generator = tiny_views(40, 88), torch.Generator().manual_seed(0)
    noisy = model.noisy_windows(views.original, generator)
    windows = model.weighted_windows(model(views.image), noisy, generator)
    parts = list(windows.parts(1))
    assert [part.classes.shape[1] for part in parts] == list(windows.widths)
    for part in parts:
        torch.testing.assert_close(part.weights.sum(dim=1), torch.ones(1, 4, 4))
    assert [len(part.t) for part in windows.parts(3)] == [3, 1]
    assert [len(part.t) for part in windows.parts(None)] == [4]


def test_class_chunks_cover_all_classes_in_order():
    model = tiny_model(class_chunk=2, min_classes=5)
    views, generator = tiny_views(), torch.Generator().manual_seed(0)
    noisy = model.noisy_windows(views.original, generator)
    windows = model.weighted_windows(model(views.image), noisy, generator)
    chunks = model.class_chunks(windows)
    assert {each.shape[1] for each in chunks} <= {1, 2}
    assert torch.equal(torch.cat([*chunks], dim=1), windows.classes)
    model.loss = tiny_loss(class_chunk=None)
    assert len(model.class_chunks(windows)) == 1


def test_what_is_drawn_for_an_image_does_not_depend_on_the_others_in_its_batch():
    model = tiny_model(timestep_range=(0.1, 0.9), classes_threshold=3)
    views = [tiny_views(40, 88, seed=seed) for seed in range(3)]
    images = torch.cat([each.original for each in views])

    def windows(image: torch.Tensor, *seeds: int):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noisy = model.noisy_windows(image, generators)
        return model.weighted_windows(model(image), noisy, generators)

    together = windows(images, 7, 8, 9)
    assert len(together.t) == 3 * 4
    for index in range(3):
        alone, part = windows(images[index : index + 1], 7 + index), slice(4 * index, 4 * index + 4)
        assert torch.equal(together.t[part], alone.t)
        assert torch.equal(together.noisy_latent[part], alone.noisy_latent)
        assert torch.equal(together.classes[part, :3], alone.classes[:, :3])


def test_one_generator_draws_for_one_image_what_its_own_would():
    model, views = tiny_model(timestep_range=(0.1, 0.9)), tiny_views(40, 88)
    one = model.noisy_windows(views.original, torch.Generator().manual_seed(3))
    own = model.noisy_windows(views.original, [torch.Generator().manual_seed(3)])
    assert torch.equal(one.noisy_latent, own.noisy_latent)


def test_the_weights_of_a_classifier_hold_for_all_cells():
    model = tiny_model(view=(32, None, None), topk=2, min_classes=3, fill="softmax")
    image, generator = tiny_views(32, 32).original.expand(2, -1, -1, -1), torch.Generator()
    noisy = model.noisy_windows(image, generator)
    logits = torch.randn(2, 7, 1, 1)
    windows = model.weighted_windows(logits, noisy, generator)
    assert windows.weights.shape == (2, 3, 4, 4)
    assert windows.mask.shape == (2, 4, 4)
    assert windows.mask.all()
    expected = model.loss.scaled(logits)[0, windows.classes[0], 0, 0].softmax(dim=0)
    torch.testing.assert_close(windows.weights[0, :, 2, 3], expected)
