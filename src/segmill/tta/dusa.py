"""DUSA: the class probabilities weight a generative guide's predictions; both models learn.

Paper:   "Exploring Structured Semantic Priors Underlying Diffusion Score for Test-time
         Adaptation", NeurIPS 2024.
Follows: its public code for the class sets, weights and loss (golden values of those). Each window
         is weighted by the logits of its own region, and all windows count.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.combined import CombinedModel, Windows
from segmill.tta.method import SharedImages, Updater, Views
from segmill.tta.window_steps import adapt_by_windows, shared_by_windows


class Dusa:
    """The joint loss of both models; its settings are `model.loss`, what it changes `model.update`.

    `step` is how often the optimizer steps: once a batch of images, or once a window.
    """

    def __init__(self, *, model: CombinedModel, step: Literal["image", "window"]) -> None:
        model.check_guided()
        self.model = model
        self.step: Literal["image", "window"] = step
        self.accumulates = step == "image"
        self.shared_images: SharedImages = shared_by_windows(model.loss, step)

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """As `model.update` says."""
        return self.model.parameters_to_update()

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from one batch of images, in one step of their mean loss."""
        return adapt_by_windows(
            self.model, views, updater, generator, step=self.step, backward=self._backward
        )

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the discriminative model; the guide has no part in them."""
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Nothing is kept between images."""

    def _backward(self, windows: Windows, updater: Updater, factor: float) -> Float[Tensor, " N"]:
        """One pass where it fits; else the residual first, then every chunk with its gradient."""
        model = self.model
        chunks = model.class_chunks(windows)
        one_pass = model.updates_generative and len(chunks) == 1
        with torch.set_grad_enabled(one_pass):
            predictions = torch.cat([model.predictions(windows, each) for each in chunks], dim=1)
        if model.updates_generative and not one_pass:
            predictions.requires_grad_()
        losses = model.losses(windows, predictions)
        if losses.requires_grad:
            # Averaged over the processes, each of which has the gradients of its own classes.
            updater.backward(losses.sum() * (factor * model.split.size))
        if model.updates_generative and not one_pass:
            assert predictions.grad is not None
            gradients = predictions.grad.split([each.shape[1] for each in chunks], dim=1)
            for classes, gradient in zip(chunks, gradients, strict=True):
                updater.backward((model.predictions(windows, classes) * gradient).sum())
        return losses.detach()
