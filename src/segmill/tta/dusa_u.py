"""DUSA-U: the guide learns without a condition, the discriminative model from its conditions.

Paper:   "Exploring Structured Semantic Priors Underlying Diffusion Score for Test-time
         Adaptation", NeurIPS 2024, the variant with one unconditional gradient.
Follows: its public code (golden values): the loss of DUSA with conditional predictions that take
         no gradient, plus the mean squared error of the unconditional prediction.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.combined import CombinedModel, Windows
from segmill.tta.method import SharedImages, Updater, Views
from segmill.tta.window_steps import adapt_by_windows, shared_by_windows


class DusaU:
    """DUSA with one backward pass of the guide a window, however many classes it has.

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
        """The conditional loss's gradient for the one model, the unconditional's for the other."""
        model = self.model
        with torch.no_grad():
            chunks = model.class_chunks(windows)
            predictions = torch.cat([model.predictions(windows, each) for each in chunks], dim=1)
        losses = model.losses(windows, predictions)
        if losses.requires_grad:
            updater.backward(losses.sum() * (factor * model.split.size))
        unconditional = self._unconditional_losses(windows)
        if unconditional.requires_grad:
            # Every process has all of it, so the average over the processes is right as it is.
            updater.backward(unconditional.sum() * factor)
        return losses.detach() + unconditional.detach()

    def _unconditional_losses(self, windows: Windows) -> Float[Tensor, " N"]:
        """Over all latent pixels: no class was left out of a prediction without classes."""
        model = self.model
        nothing = torch.full_like(windows.classes[:, :1], model.guide.num_classes)
        with torch.set_grad_enabled(model.updates_generative):
            prediction = model.predictions(windows, nothing)[:, 0]
        return (prediction - windows.target).square().mean(dim=(1, 2, 3))
