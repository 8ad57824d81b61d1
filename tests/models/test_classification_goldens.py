"""DUSA's classification steps against its published code, through the methods as they adapt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segmill.models.class_sets import ClassSets
from segmill.models.combined import CombinedModel, Update
from segmill.models.discriminative import Discriminative
from segmill.models.guide_view import GuideView
from segmill.models.joint_loss import JointLoss
from segmill.tta.dusa import Dusa
from segmill.tta.dusa_u import DusaU
from segmill.tta.method import Views
from tiny_adapt import PlainUpdater, tiny_loss

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "dusa"
CASES = {
    name: facts
    for name, facts in json.loads((GOLDENS / "golden.json").read_text()).items()
    if name.startswith("cls")
}
CELLS = 6  # of a latent's side
PIXELS = 8 * CELLS
# Float32 sums in another order; losses are about 1, gradients about 1e-3.
LOSS = {"atol": 2e-6, "rtol": 0.0}
GRADIENT = {"atol": 2e-8, "rtol": 1e-5}


class StoredLogits(nn.Module):
    """Hands back one row of logits for each image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor) -> Tensor:
        assert len(image) == len(self.logits)
        return self.logits[:, :, None, None]


class StoredPredictions(nn.Module):
    """Predictions of every image under every class, and without one."""

    def __init__(self, pred: Tensor, unconditional: Tensor) -> None:
        super().__init__()
        self.pred, self.unconditional = nn.Parameter(pred), nn.Parameter(unconditional)


class StandInGuide(nn.Module):
    """Its latents, noise and predictions are the stored ones."""

    def __init__(self, network: StoredPredictions, noise: Tensor) -> None:
        super().__init__()
        self.network, self.noise = network, noise
        self.num_classes, self.cell = network.pred.shape[1], 8
        self.view = GuideView(short=PIXELS, window=None, stride=None, multiple=8)

    def blocks(self) -> list[nn.Module]:
        return []

    def fill(self, device: torch.device) -> None:
        """Nothing waits."""

    def encode(self, window: Tensor) -> Tensor:
        return torch.zeros(len(window), 4, CELLS, CELLS)

    def noisy(self, latent: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return latent, self.noise

    def predict(self, noisy_latent: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        network = self.network
        table = torch.cat([network.pred, network.unconditional[:, None]], dim=1)
        return table[torch.arange(len(classes))[:, None], classes]


def golden(case: str) -> dict[str, Tensor]:
    with np.load(GOLDENS / "golden.npz") as arrays:
        names = [each for each in arrays.files if each.startswith(f"{case}/")]
        return {each.partition("/")[2]: torch.from_numpy(arrays[each]) for each in names}


def model_of(case: str, stored: dict[str, Tensor]) -> CombinedModel:
    """Predictions of classes that were not selected are not stored, and are not asked for."""
    logits, selected = stored["raw_logits"], stored["selected"]
    table = torch.full((*logits.shape, 4, CELLS, CELLS), torch.nan)
    rows = torch.arange(len(selected))[:, None]
    table[rows, selected] = stored["pred"]
    nothing = stored.get("uncond_pred", torch.full_like(stored["noise"], torch.nan))
    count = selected.shape[1]
    return CombinedModel(
        discriminative=Discriminative(network=StoredLogits(logits), mean=[0.5] * 3, std=[0.25] * 3),
        generative=StandInGuide(StoredPredictions(table, nothing), stored["noise"]),
        update=Update(discriminative=True, generative=True, update_norm_only=False),
        loss=tiny_loss(
            topk=CASES[case]["topk"],
            min_classes=count,
            classes_threshold=count,
            fill="softmax",
            windows_at_once=None,
        ),
    )


def replay(monkeypatch: pytest.MonkeyPatch, selected: Tensor) -> None:
    """Take the classes that the published code drew."""

    def stored_sets(self: Any, window_logits: Tensor, *_: Any) -> ClassSets:
        top = window_logits.flatten(1).topk(self.topk, dim=1).indices
        assert torch.equal(top.sort(dim=1).values, selected[:, : self.topk].sort(dim=1).values)
        valid = torch.ones_like(selected, dtype=torch.bool)
        mask = torch.ones(len(selected), 1, 1, dtype=torch.bool)
        return ClassSets(selected, valid, mask, (selected.shape[1],) * len(selected))

    monkeypatch.setattr(JointLoss, "class_sets", stored_sets)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_loss_and_the_gradients_of_the_published_code(
    case: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the set of drawn classes is forced, whatever the seed, else the stored draw."""
    stored = golden(case)
    model = model_of(case, stored)
    if CASES[case]["drawn"]:
        replay(monkeypatch, stored["selected"])
    kind = DusaU if case.startswith("clsU") else Dusa
    method = kind(model=model, step="image")
    updater = PlainUpdater(method.parameters_to_update())
    image = torch.zeros(len(stored["noise"]), 3, PIXELS, PIXELS, dtype=torch.uint8)
    views = Views(image=image, original=image, seeds=tuple(range(seed, seed + len(image))))
    logits, loss = method.adapt(views, updater, torch.Generator())
    assert torch.equal(logits[:, :, 0, 0], stored["raw_logits"])
    torch.testing.assert_close(loss, stored["loss"], **LOSS)
    (gradients,) = updater.steps
    of_logits = gradients["discriminative.network.logits"]
    torch.testing.assert_close(of_logits, stored["grad_raw_logits"], **GRADIENT)
    if kind is DusaU:
        of_nothing = gradients["generative.network.unconditional"]
        torch.testing.assert_close(of_nothing, stored["grad_uncond_pred"], **GRADIENT)
        assert not gradients["generative.network.pred"].any()
    elif "grad_pred" in stored:
        of_pred = gradients["generative.network.pred"]
        rows = torch.arange(len(image))[:, None]
        selected = of_pred[rows, stored["selected"]]
        torch.testing.assert_close(selected, stored["grad_pred"], **GRADIENT)
        of_pred[rows, stored["selected"]] = 0
        assert not of_pred.any(), "classes that were not selected"


def test_without_drawn_classes_it_is_the_originals_sample_reverse_logits() -> None:
    """There the drawn classes get no weight: the loss is that of the top classes alone."""
    stored = golden("cls_top4_mult2_rand")
    logits, selected = stored["raw_logits"], stored["selected"]
    top = selected[:, :4]
    weights = torch.nn.functional.normalize(logits, dim=1).gather(1, top).softmax(dim=1)
    mixed = (weights[:, :, None, None, None] * stored["pred"][:, :4]).sum(dim=1)
    expected = (mixed - stored["noise"]).square().mean()
    cut = {**stored, "selected": top, "pred": stored["pred"][:, :4]}
    model = model_of("cls_top4_mult2_rand", cut)
    image = torch.zeros(len(logits), 3, PIXELS, PIXELS, dtype=torch.uint8)
    method = Dusa(model=model, step="image")
    updater = PlainUpdater(method.parameters_to_update())
    _, loss = method.adapt(Views(image=image, original=image), updater, torch.Generator())
    torch.testing.assert_close(loss, expected, **LOSS)
