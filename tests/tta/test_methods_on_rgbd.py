"""Methods of adaptation on images with depth as their fourth channel; the guide sees colour."""

import pytest
import torch

import segmill
from segmill.models.combined import CombinedModel
from tiny_adapt import CLASSES, TinyGuide, tiny_model, tiny_views
from tiny_methods import TorchUpdater, method_of, optimizer_of

VARIANTS = ["fcn_tiny_rgbd", "deeplabv3plus_tiny_rgbd", "dformer-tiny"]
UPDATING = ("tent", "cotta", "dusa")  # sar: only where pixels are reliable


def model_of(variant: str) -> CombinedModel:
    tiny = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = segmill.load(variant, num_classes=CLASSES).model
    return CombinedModel(
        discriminative=network, generative=tiny.generative, update=tiny.update, loss=tiny.loss
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_with_depth_adapt_by_every_method(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = TinyGuide.encode

    def watched(guide: TinyGuide, window: torch.Tensor) -> torch.Tensor:
        seen.append(window.shape[1])
        return encode(guide, window)

    monkeypatch.setattr(TinyGuide, "encode", watched)
    model = model_of(variant)
    views = tiny_views(64, 96, channels=4)
    for name in ("source", "bn", "tent", "sar", "cotta", "dusa"):
        method = method_of(name, model)
        parameters = method.parameters_to_update()
        before = {key: each.detach().clone() for key, each in parameters.items()}
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in parameters)
        updater = TorchUpdater(optimizer_of(parameters or {"none": torch.zeros(1)}))
        logits, loss = method.adapt(views, updater, torch.Generator().manual_seed(0))
        assert logits.shape[:2] == (1, CLASSES)
        assert torch.isfinite(logits).all()
        assert torch.isfinite(loss)
        changed = any(not torch.equal(before[key], each) for key, each in parameters.items())
        assert changed or name not in UPDATING
    assert set(seen) == {3}
