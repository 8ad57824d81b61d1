from functools import partial

import pytest
import torch

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel
from segmill.tta.dusa import Dusa
from segmill.tta.dusa_u import DusaU
from tiny_adapt import adapt_once, tiny_model, tiny_views

# Float32 sums in another order; the gradients here are between 1e-4 and 1e-1.
CLOSE = {"atol": 1e-6, "rtol": 0.0}
VIEWS = tiny_views(40, 88)
DRAWN = {"classes_threshold": 3}  # class sets that need a draw, and masks


def plain(model: CombinedModel, views=VIEWS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by one forward of everything and one backward."""
    generator = torch.Generator().manual_seed(0)
    noisy = model.noisy_windows(views.original, generator)
    windows = model.weighted_windows(model(views.image), noisy, generator)
    predictions = model.predictions(windows, windows.classes)
    loss = model.losses(windows, predictions).mean()
    parameters = model.parameters_to_update()
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(each.any() for each in found.values()), "every weight takes part"
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"windows_at_once": None},
        {"windows_at_once": 3, "buckets": (4, 8)},
        {"class_chunk": 2},
        {"class_chunk": 2, "windows_at_once": None, "buckets": (5,)},
        {"class_chunk": 7, "topk": 3},
        {**DRAWN, "mask_reduction": "all"},
        {**DRAWN, "class_chunk": 1, "logits": "raw", "temperature": 0.5},
    ],
    ids=str,
)
def test_leaf_windows_and_chunks_give_the_gradients_of_one_backward(keys):
    loss, expected = plain(tiny_model(**keys | {"class_chunk": None}))
    _, found, updater = adapt_once(Dusa, tiny_model(**keys), VIEWS)
    torch.testing.assert_close(found, loss, **CLOSE)
    (gradients,) = updater.steps
    check_gradients(gradients, expected)


@pytest.mark.parametrize("method", [Dusa, DusaU])
@pytest.mark.parametrize("update", [(True, False, False), (False, True, False), (True, True, True)])
def test_a_part_that_is_not_updated_changes_nothing_for_the_other(method, update):
    _, both_loss, both = adapt_once(method, tiny_model(), VIEWS)
    _, loss, updater = adapt_once(method, tiny_model(update=update), VIEWS)
    torch.testing.assert_close(loss, both_loss, **CLOSE)
    for name, gradient in updater.steps[0].items():
        torch.testing.assert_close(gradient, both.steps[0][name], **CLOSE)


@pytest.mark.parametrize("method", [Dusa, DusaU])
@pytest.mark.parametrize("step", ["image", "window"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_with_nothing_to_update_the_loss_is_still_reported(method, step, chunk):
    model = tiny_model(update=(False, False, False), class_chunk=chunk)
    logits, loss, updater = adapt_once(method, model, VIEWS, step=step)
    assert updater.steps == []
    assert loss > 0
    torch.testing.assert_close(logits, model(VIEWS.image), atol=0, rtol=0)


def test_a_frozen_guide_runs_without_activations():
    seen = []
    model = tiny_model(update=(True, False, False))
    hook = model.guide.network.first.register_forward_hook(
        lambda _, __, output: seen.append(output.requires_grad)
    )
    adapt_once(Dusa, model, VIEWS)
    hook.remove()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("method", [Dusa, DusaU])
def test_logits_are_those_from_before_the_update(method):
    model = tiny_model()
    before = model(VIEWS.image).detach()
    logits, _, _ = adapt_once(method, model, VIEWS, rate=0.1)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, before, atol=0, rtol=0)
    assert not torch.equal(method(model=model, step="image").predict(VIEWS), before)


def test_a_step_for_every_window_sees_the_weights_of_the_last_step():
    model = tiny_model()
    before = model(VIEWS.image).detach()
    logits, loss, updater = adapt_once(Dusa, model, VIEWS, step="window", rate=0.1)
    assert len(updater.steps) == 4
    torch.testing.assert_close(logits, before, atol=0, rtol=0)
    frozen = adapt_once(Dusa, tiny_model(), VIEWS, step="window", rate=0.0)
    torch.testing.assert_close(frozen[1], plain(tiny_model())[0], **CLOSE)
    assert not torch.equal(loss, frozen[1])


def test_without_a_step_between_windows_their_gradients_add_up_to_the_images():
    _, _, by_image = adapt_once(Dusa, tiny_model(), VIEWS)
    _, _, by_window = adapt_once(Dusa, tiny_model(), VIEWS, step="window")
    for name, gradient in by_image.steps[0].items():
        mean = torch.stack([step[name] for step in by_window.steps]).mean(dim=0)
        torch.testing.assert_close(mean, gradient, **CLOSE)


def test_updates_between_windows_reach_autocasts_copies_of_the_weights(monkeypatch):
    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return adapt_once(Dusa, tiny_model(), VIEWS, step="window", rate=1.0)[1]

    found = loss()
    monkeypatch.setattr(torch, "autocast", partial(torch.autocast, cache_enabled=False))
    assert torch.equal(found, loss())


def test_chunks_under_autocast_lose_no_gradient_to_the_pass_without_one():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, at_once = adapt_once(Dusa, tiny_model(), VIEWS)
        _, _, in_chunks = adapt_once(Dusa, tiny_model(class_chunk=2), VIEWS)
    for name, gradient in in_chunks.steps[0].items():
        difference = (gradient - at_once.steps[0][name]).norm()
        assert difference < 0.02 * gradient.norm(), name  # bfloat16 has 8 bits


def test_descent_lowers_the_loss():
    model = tiny_model()
    losses = [float(adapt_once(Dusa, model, VIEWS, rate=0.05)[1]) for _ in range(10)]
    assert losses[-1] < 0.98 * losses[0]


def test_dusa_u_asks_for_one_unconditional_prediction_a_window():
    model = tiny_model()
    conditional = tiny_model()
    adapt_once(DusaU, model, VIEWS)
    adapt_once(Dusa, conditional, VIEWS)
    expected = [call for each in conditional.generative.calls for call in (each, (1, 1))]
    assert model.generative.calls == expected


def test_dusa_u_adds_the_unconditional_error_and_only_that_reaches_the_guide():
    _, found, updater = adapt_once(DusaU, tiny_model(), VIEWS)
    model = tiny_model()
    loss, joint = plain(model)
    generator = torch.Generator().manual_seed(0)
    noisy = model.noisy_windows(VIEWS.original, generator)
    nothing = torch.full((4, 1), model.guide.num_classes)
    prediction = model.guide.predict(noisy.noisy_latent, noisy.t, nothing)[:, 0]
    unconditional = (prediction - noisy.target).square().mean()
    unconditional.backward()
    torch.testing.assert_close(found, loss + unconditional.detach(), **CLOSE)
    for name, parameter in model.named_parameters():
        own = joint[name] if name.startswith("discriminative.") else parameter.grad
        torch.testing.assert_close(updater.steps[0][name], own, **CLOSE)


@pytest.mark.parametrize("method", [Dusa, DusaU])
def test_portrait_and_depth_images_and_whole_views_work(method):
    portrait = tiny_views(88, 40)
    for view, windows in (((32, 32, 16), 4), ((32, None, None), 1)):
        model = tiny_model(view=view)
        logits, loss, _ = adapt_once(method, model, portrait)
        assert logits.shape == (1, 7, 22, 10)
        assert torch.isfinite(loss)
        assert sum(count for count, _ in model.generative.calls) >= windows


def test_only_the_colours_go_to_the_guide():
    views = tiny_views(40, 88, channels=4)
    logits, loss, _ = adapt_once(Dusa, tiny_model(channels=4), views)
    assert logits.shape == (1, 7, 10, 22)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("method", [Dusa, DusaU])
def test_without_a_guide_the_method_is_refused(method):
    tiny = tiny_model()
    model = CombinedModel(
        discriminative=tiny.discriminative, generative=None, update=tiny.update, loss=tiny.loss
    )
    with pytest.raises(SegmillError, match="needs a generative guide"):
        method(model=model, step="image")
