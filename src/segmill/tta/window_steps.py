"""The order of work of methods that learn from a guide: windows, their gradients, the steps.

Gradients of all windows gather on the weights, a leaf of few numbers, so the discriminative model
runs backward once a step and no more than one window's graph of the guide is alive.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segmill.draws import Generators
from segmill.models.combined import CombinedModel, NoisyWindows, Windows
from segmill.models.joint_loss import JointLoss
from segmill.tta.method import SharedImages, Updater, Views

# Adds the gradients of some windows, times a factor, and returns the windows' losses, detached.
Backward = Callable[[Windows, Updater, float], Float[Tensor, " N"]]


def adapt_by_windows(
    model: CombinedModel,
    views: Views,
    updater: Updater,
    generator: torch.Generator,
    *,
    step: Literal["image", "window"],
    backward: Backward,
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
    """One optimizer step a batch, or one a window; the logits are those before the first.

    A step for every window runs the discriminative model anew for each.
    """
    draws = views.generators(generator)
    noisy = model.noisy_windows(views.original[:, :3], draws)
    count = len(noisy.t)
    groups = [slice(0, count)]
    if step == "window":
        groups = [slice(index, index + 1) for index in range(count)]
    first: Tensor | None = None
    losses: list[Tensor] = []
    for group in groups:
        logits, windows = _windows(model, views, noisy, draws)
        first = logits.detach() if first is None else first
        losses += _accumulate(model, windows.part(group), updater, backward, views.weight)
        if model.updates_discriminative or model.updates_generative:
            updater.step()
            # Autocast would go on with the weights' copies from before the step.
            torch.clear_autocast_cache()
    assert first is not None
    return first, torch.cat(losses).mean()


def shared_by_windows(loss: JointLoss, step: Literal["image", "window"]) -> SharedImages:
    """What becomes of it where processes have other images, and other numbers of them."""
    if step == "window":
        return "never"
    return "unsharded" if loss.passes_vary else "together"


def _windows(
    model: CombinedModel, views: Views, noisy: NoisyWindows, draws: Generators
) -> tuple[Float[Tensor, "B K h w"], Windows]:
    """Logits of the model as it is now, and the windows they weight."""
    with torch.set_grad_enabled(model.updates_discriminative):
        logits = model.discriminative(views.image)
        return logits, model.weighted_windows(logits, noisy, draws)


def _accumulate(
    model: CombinedModel, windows: Windows, updater: Updater, backward: Backward, weight: float
) -> list[Float[Tensor, " n"]]:
    """Gradients of `weight` times the mean of the windows' losses; returns these, part by part."""
    leaf = windows.weights.detach().requires_grad_(model.updates_discriminative)
    at_once = model.loss.windows_at_once
    if at_once == "processes":
        at_once = model.split.size
    parts = replace(windows, weights=leaf).parts(at_once)
    losses = [backward(part, updater, weight / len(windows.widths)) for part in parts]
    if leaf.grad is not None:
        updater.backward((windows.weights * leaf.grad).sum())
    return losses
