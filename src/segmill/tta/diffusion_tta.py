"""Diffusion-TTA: a guide denoises under a mixture of class vectors, image by image.

Paper:   Prabhudesai et al., "Diffusion-TTA: Test-time Adaptation of Discriminative Models via
         Generative Feedback", NeurIPS 2023, https://arxiv.org/abs/2311.16102
Follows: the paper and its public code, whose numbers for DiT are in configs/tta/diffusion_tta.yaml:
         the classifier's probabilities weight the classes' vectors, one condition an image, and
         the loss is the mean squared error of many noisy latents under it.
"""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel
from segmill.models.generative.guide import MixingGuide
from segmill.tta.method import SharedImages, Updater, Views
from segmill.tta.weight_sets import WeightSet


class DiffusionTTA:
    """`steps` steps on each image, which start from the source; its prediction comes after them.

    A step's loss is the mean over `draws` times and noises, `draws_at_once` of them in one pass
    (null: all). Times are drawn uniformly from `timestep_range`, shares of noise. The `topk`
    classes that are most probable before the first step are mixed (null: all). `model.update`
    says what learns.
    """

    shared_images: SharedImages = "alone"

    def __init__(
        self,
        *,
        model: CombinedModel,
        steps: int,
        draws: int,
        draws_at_once: int | None,
        topk: int | None,
        timestep_range: tuple[float, float],
    ) -> None:
        guide = model.guide
        if not isinstance(guide, MixingGuide):
            raise SegmillError(
                f"tta=diffusion_tta mixes the vectors of classes into one condition, and the guide "
                f"{type(guide).__name__} has no such vector (no `predict_mixed`). Choose a SiT or "
                "a DiT with model/generative=NAME, or another method: tta=dusa takes any guide."
            )
        counts = [each for each in (steps, draws, topk, draws_at_once) if each is not None]
        if min(counts) < 1 or not (0 <= timestep_range[0] <= timestep_range[1] <= 1):
            raise SegmillError(
                f"tta.method: steps={steps}, draws={draws}, draws_at_once={draws_at_once} and "
                f"topk={topk} should be above 0 (the last two may be null), and timestep_range="
                f"{list(timestep_range)} rise from 0 or more to 1 or less."
            )
        if topk is not None and topk > guide.num_classes:
            raise SegmillError(
                f"tta.method.topk={topk}, but the guide knows {guide.num_classes} classes. Choose "
                "a smaller one, or null for all."
            )
        self.model = model
        self.guide = guide
        self.steps, self.draws, self.draws_at_once = steps, draws, draws_at_once
        self.topk, self.timestep_range = topk, timestep_range
        self.reset()

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """As `model.update` says; the discriminative model has to be part of it."""
        if not self.model.updates_discriminative:
            raise SegmillError(
                "tta=diffusion_tta starts every image from the source, so with "
                "model.update.discriminative=false no prediction would ever change. Set it to true."
            )
        return self.model.parameters_to_update()

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from each image by itself; the logits are those after its steps."""
        parameters = self.parameters_to_update()
        if self._source is None:
            self._source = WeightSet(parameters)
        logits, losses = [], []
        for alone, draws in views.each(generator):
            losses.append(self._learn(alone.image, alone.original, updater, draws))
            with torch.no_grad():
                logits.append(self.model.discriminative(alone.image))
            self._source.put_into(parameters)
            updater.forget()
        self._last = views, torch.cat(logits)
        return self._last[1], torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """What `adapt` said of the same images just now; of others, the source's logits."""
        if self._last is not None and self._last[0] is views:
            return self._last[1]
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Forget the last images; the weights at the next one are the source's."""
        self._source: WeightSet | None = None
        self._last: tuple[Views, Float[Tensor, "B K h w"]] | None = None

    def _learn(
        self,
        image: UInt8[Tensor, "1 C H W"],
        original: UInt8[Tensor, "1 C _H _W"],
        updater: Updater,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """The loss of the first step."""
        latent = self.guide.encode(self.guide.view.windows(original[:, :3]))
        if len(latent) != 1:
            raise SegmillError(
                f"tta=diffusion_tta has one condition an image, and the guide's view cuts an image "
                f"of {original.shape[2]} x {original.shape[3]} pixels into {len(latent)} windows. "
                "Crop images to squares, or set model.generative.view.window and .stride to null."
            )
        classes: Int64[Tensor, "1 M"] | None = None
        losses: list[Tensor] = []
        for _ in range(self.steps):
            logits = self.model.discriminative(image)
            self._check(logits)
            values = logits.float().flatten(1)
            if classes is None:
                classes = values.topk(self.topk or values.shape[1], dim=1).indices
            assert classes is not None
            weights = values.gather(1, classes).softmax(dim=1)
            leaf = weights.detach().requires_grad_()
            losses.append(self._denoise(latent, classes, leaf, updater, generator))
            # One backward of the discriminative model, whatever the number of passes.
            updater.backward((weights * leaf.grad).sum())
            updater.step()
        return losses[0]

    def _denoise(
        self,
        latent: Float[Tensor, "1 C h w"],
        classes: Int64[Tensor, "1 M"],
        weights: Float[Tensor, "1 M"],
        updater: Updater,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Add the gradients of the mean over all draws; times are drawn first, then the noise."""
        device, (low, high) = latent.device, self.timestep_range
        drawn = torch.rand(self.draws, generator=generator, device=generator.device)
        t = (low + (high - low) * drawn).to(device)
        shape = (self.draws, *latent.shape[1:])
        noise = torch.randn(shape, generator=generator, device=generator.device).to(device)
        total = latent.new_zeros(())
        at_once = self.draws_at_once or self.draws
        for times, noises in zip(t.split(at_once), noise.split(at_once), strict=True):
            count = len(times)
            noisy_latent, target = self.guide.noisy(latent.expand_as(noises), noises, times)
            prediction = self.guide.predict_mixed(
                noisy_latent, times, classes.expand(count, -1), weights.expand(count, -1)
            )
            error = (prediction.float() - target).square().mean(dim=(1, 2, 3)).sum() / self.draws
            updater.backward(error)
            total += error.detach()
        return total

    def _check(self, logits: Float[Tensor, "1 K h w"]) -> None:
        if logits.shape[2:] != (1, 1):
            raise SegmillError(
                "tta=diffusion_tta gives the guide one condition an image, mixed by the classes' "
                "probabilities; a segmented image has other ones at every pixel, for which the "
                "paper uses a guide of another kind. For segmentation choose tta=dusa."
            )
        if logits.shape[1] != self.guide.num_classes:
            raise SegmillError(
                f"model.discriminative has {logits.shape[1]} classes and model.generative "
                f"{self.guide.num_classes}. Both are for the classes of one data set."
            )
