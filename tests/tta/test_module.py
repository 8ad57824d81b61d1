"""TTAModule under a Trainer: what it keeps, restores, draws and refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segmill.cli import main
from segmill.data.tasks import Task
from segmill.errors import SegmillError
from segmill.inference import label_of_logits
from segmill.models.combined import CombinedModel
from segmill.optim import SGD, AdamW
from segmill.tta import updaters
from segmill.tta.cotta import CoTTA
from segmill.tta.dusa import Dusa
from segmill.tta.module import TTAModule
from segmill.tta.source import Source
from segmill.tta.tent import Tent
from tiny_adapt import tiny_model, tiny_views
from tiny_adaptation import adapt_tiny, tiny_adapt_words
from tiny_images import adapt_images
from tiny_methods import BatchNormNet, tiny_combined
from tiny_tasks import PROTOCOL
from tiny_trainer import HEIGHT, WIDTH, fit, module_of

RULES: dict[str, Any] = {"weight_decay": 0.0, "rules": {}, "norm_decay_mult": None}
SETTINGS = AdamW(learning_rate=1e-3, betas=(0.9, 0.999), **RULES)
COTTA: dict[str, Any] = {"ratios": (0.5, 1.0), "flip": True, "multiple": 8, "threshold": 0.69}
COTTA |= {"momentum": 0.999, "restore": 0.01}
TASKS = [Task(1, "fog", 5), Task(2, "snow", 5)]


class Recorder(Source):
    """Learns nothing, and notes from which seeds it could have drawn; `loss` from call `at` on."""

    def __init__(self, *, model: CombinedModel, loss: float = 0.0, at: int = 0) -> None:
        super().__init__(model=model)
        self.seeds: list[int] = []
        self.loss, self.at = loss, at

    def adapt(self, views: Any, updater: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits, loss = super().adapt(views, updater, generator)
        self.seeds.append(generator.initial_seed())
        return logits, loss + (self.loss if len(self.seeds) > self.at else 0.0)


def weights_of(module: TTAModule) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in module.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_reset_gives_back_every_bit_and_an_optimizer_without_a_past(tmp_path: Path) -> None:
    model = tiny_model()
    module = module_of(model)
    module.begin(Dusa(model=model, step="image"), SETTINGS, batch_statistics=False)
    source = weights_of(module)
    states: list[int] = []
    step = module.on_train_start

    def note() -> None:
        step()
        states.append(len(module.optimizers().optimizer.state))

    module.on_train_start = note
    fit(module, tmp_path, TASKS[0])
    first, losses = weights_of(module), module.record.course.mean_loss()
    assert not any(torch.equal(first[name], source[name]) for name in first)
    module.reset()
    assert same(source, weights_of(module))
    fit(module, tmp_path, TASKS[0])
    assert same(first, weights_of(module)), "after a reset the task goes as it went"
    assert module.record.course.mean_loss() == losses
    fit(module, tmp_path, TASKS[0])
    assert states == [0, 0, len(list(model.parameters()))], "without one the optimizer goes on"
    assert module.record.course.mean_loss() < losses


def test_another_method_begins_with_the_sources_weights_and_statistics(tmp_path: Path) -> None:
    model = tiny_combined(BatchNormNet)
    module = module_of(model, num_classes=5)
    source = weights_of(module)
    settings = SGD(learning_rate=0.1, momentum=0.9, **RULES)
    module.begin(Tent(model=model), settings, batch_statistics=True)
    fit(module, tmp_path, TASKS[0])
    assert not same(source, weights_of(module))
    hooks = [len(each._forward_pre_hooks) for each in model.modules()]
    assert any(hooks)
    module.begin(Source(model=model), None, batch_statistics=False)
    assert same(source, weights_of(module))
    assert not any(len(each._forward_pre_hooks) for each in model.modules())
    fit(module, tmp_path, TASKS[1])
    assert same(source, weights_of(module))


def test_every_image_of_every_task_and_epoch_has_draws_of_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    seeds: list[list[int]] = []
    for seed in (0, 0, 1):
        module = module_of(model, seed=seed)
        method = Recorder(model=model)
        module.begin(method, None, batch_statistics=False)
        for task in TASKS:
            fit(module, tmp_path, task, epochs=2)
        seeds.append(method.seeds)
    assert len(set(seeds[0])) == 2 * 2 * 3
    assert seeds[0] == seeds[1]
    assert not set(seeds[0]) & set(seeds[2])


class Drawing(nn.Module):
    """Draws in its forward pass, as Hamburger does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(image)
        return logits + torch.rand_like(logits)


def test_what_a_network_draws_follows_from_the_image_whatever_was_drawn_before(
    tmp_path: Path,
) -> None:
    found: list[tuple[float, dict[str, Tensor], Tensor]] = []
    for draws in (0, 5):
        model = tiny_model()
        model.discriminative.network = Drawing(model.discriminative.network)
        module = module_of(model, predict="after")
        module.begin(CoTTA(model=model, **COTTA), SETTINGS, batch_statistics=False)
        torch.rand(draws)
        preds: list[Tensor] = []
        module.on_images = lambda index, batch, pred, to=preds: to.append(pred)
        fit(module, tmp_path, TASKS[0])
        found.append((module.record.course.mean_loss(), weights_of(module), torch.cat(preds)))
    (loss, weights, pred), (other_loss, other_weights, other_pred) = found
    assert loss == other_loss
    assert same(weights, other_weights)
    assert torch.equal(pred, other_pred)


def test_a_step_leaves_the_generators_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, states = TTAModule.training_step, []

    def watched(self: TTAModule, batch: dict[str, Any], batch_idx: int) -> None:
        states.append(torch.random.get_rng_state())
        step(self, batch, batch_idx)
        states.append(torch.random.get_rng_state())

    monkeypatch.setattr(TTAModule, "training_step", watched)
    model = tiny_model()
    model.discriminative.network = Drawing(model.discriminative.network)
    module = module_of(model)
    module.begin(Source(model=model), None, batch_statistics=False)
    fit(module, tmp_path, TASKS[0], images=2)
    assert len(states) == 4
    assert all(torch.equal(each, states[0]) for each in states)


@pytest.mark.parametrize("predict", ["before", "after"])
def test_the_prediction_is_from_before_or_after_the_update(tmp_path: Path, predict: str) -> None:
    model = tiny_model()
    module = module_of(model, predict=predict)
    method = Dusa(model=model, step="image")
    module.begin(method, SGD(learning_rate=1.0, momentum=0.0, **RULES), batch_statistics=False)
    before = method.predict(tiny_views(seed=0))
    preds: list[Tensor] = []
    module.on_images = lambda index, batch, pred: preds.append(pred)
    fit(module, tmp_path, TASKS[0], images=1)
    after = method.predict(tiny_views(seed=0))
    by_weights = {
        name: label_of_logits(logits, (HEIGHT, WIDTH), (HEIGHT, WIDTH), PROTOCOL)
        for name, logits in {"before": before, "after": after}.items()
    }
    assert not torch.equal(*by_weights.values())
    assert torch.equal(preds[0], by_weights[predict])


def test_a_method_that_learns_needs_an_optimizer(tmp_path: Path) -> None:
    model = tiny_model()
    module = module_of(model)
    module.begin(Dusa(model=model, step="image"), None, batch_statistics=False)
    with pytest.raises(SegmillError, match="Dusa updates weights, but optimizer is null"):
        fit(module, tmp_path, TASKS[0])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_image(
    tmp_path: Path, loss: float
) -> None:
    model = tiny_model()
    module = module_of(model, evidence=tmp_path / "evidence")
    module.begin(Recorder(model=model, loss=loss), None, batch_statistics=False)
    with pytest.raises(SegmillError, match=rf"image 0 \(number 1 .* is {loss}\..*learning_rate"):
        fit(module, tmp_path, TASKS[0])
    folder = tmp_path / "evidence" / "rank0"
    facts = json.loads((folder / "evidence.json").read_text())
    assert facts["images"] == ["image 0"]
    assert {path.name for path in folder.iterdir()} == {
        "evidence.json",
        "00_image.png",
        "00_label.png",
    }


def test_the_batch_of_a_step_whose_loss_is_not_finite_is_named(tmp_path: Path) -> None:
    # Three batches of two images make the step.
    match = r"images image 2, image 3 \(from number 3 of their task on\) is nan"
    with pytest.raises(SegmillError, match=match):
        adapt_images(
            lambda model: Recorder(model=model, loss=math.nan, at=1),
            tmp_path,
            count=6,
            batch=2,
            accumulate=3,
        )


def test_of_a_large_batch_a_few_images_are_named(tmp_path: Path) -> None:
    match = r"images image 0, image 1, image 2 and 2 more \(from number 1 of their task on\) is nan"
    with pytest.raises(SegmillError, match=match):
        adapt_images(lambda model: Recorder(model=model, loss=math.nan), tmp_path, count=5, batch=5)


def test_a_learning_rate_that_breaks_the_model_is_said_with_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_adapt_words(tmp_path, optimizer__learning_rate="1e30", pictures=0)
    assert main(["adapt", *words]) == 2
    message = capsys.readouterr().err
    assert "optimizer.learning_rate is too high" in message
    folder = tmp_path / "runs" / "tiny" / "evidence" / "rank0"
    (name,) = json.loads((folder / "evidence.json").read_text())["images"]
    assert f"image {name} (number" in message
    assert str(folder) in message


GUIDED = ("Dusa", "DusaU")


def test_in_a_step_all_is_in_eval_mode_and_only_what_is_chosen_has_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tiny SD3 with its codec and text, for every method."""
    seen: dict[str, int] = {}
    step = updaters.DirectUpdater.step

    def check(updater: Any) -> None:
        module: TTAModule = updater._module
        chosen = set(module.method.parameters_to_update())
        gradients = {
            name: each.grad
            for name, each in module.model.named_parameters()
            if each.grad is not None
        }
        assert gradients
        assert set(gradients) <= chosen
        guide = module.model.guide
        assert not any(each.requires_grad for each in guide.codec.parameters())
        assert not any(each.requires_grad for each in guide.buffers())
        name = type(module.method).__name__
        parts = {each.partition(".")[0] for each, value in gradients.items() if value.any()}
        assert parts == ({"discriminative", "generative"} if name in GUIDED else {"discriminative"})
        seen[name] = seen.get(name, 0) + 1
        step(updater)

    modes: list[bool] = []
    training_step = TTAModule.training_step

    def watched(self: TTAModule, batch: dict[str, Any], batch_idx: int) -> None:
        hooks = [
            each.register_forward_pre_hook(lambda module, _: modes.append(module.training))
            for each in self.modules()
        ]
        training_step(self, batch, batch_idx)
        for hook in hooks:
            hook.remove()
        assert not any(each.training for each in self.modules())

    monkeypatch.setattr(updaters.DirectUpdater, "step", check)
    monkeypatch.setattr(TTAModule, "training_step", watched)
    methods = "[bn,tent,sar,cotta,dusa,dusa_u]"
    adapt_tiny(tmp_path, methods=methods, limit=1, pictures=0, model__loss__topk=3)
    assert set(seen) >= {"Tent", "CoTTA", "Dusa", "DusaU"}
    assert modes
    assert not any(modes)


def test_the_record_is_of_the_images_in_their_order(tmp_path: Path) -> None:
    model = tiny_model()
    module = module_of(model)
    module.begin(Source(model=model), None, batch_statistics=False)
    kept: list[int] = []
    module.on_images = lambda index, batch, pred: kept.append(index)
    fit(module, tmp_path, TASKS[0])
    result = module.record.result(task="01_fog_5", corruption="fog", severity=5)
    assert result.names == ("image 0", "image 1", "image 2")
    assert kept == [0, 1, 2]
    np.testing.assert_array_equal(result.counts.areas[:, 1].argmax(axis=1), [0, 1, 2])
    assert result.counts.confusion.sum() == 3 * HEIGHT * WIDTH
