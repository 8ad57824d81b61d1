"""MEMO: one step on each image makes its augmented copies agree; then the source again.

Paper:   Zhang et al., "MEMO: Test Time Robustness via Adaptation and Augmentation", NeurIPS 2022,
         https://arxiv.org/abs/2110.09506
Follows: the paper and its public code, whose numbers are in configs/tta/memo.yaml. Copies are
         augmix.py's. The paper classifies. For segmentation the same is asked pixel by pixel, of
         copies whose pixels stay in place, and of mirror images turned back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.models.combined import DISCRIMINATIVE, CombinedModel
from segmill.tta.augmix import augmix_copies
from segmill.tta.method import SharedImages, Updater, Views
from segmill.tta.mixed_statistics import MixedStatistics
from segmill.tta.weight_sets import WeightSet


class MEMO:
    """One step on the entropy of the mean prediction of `copies`; the prediction comes after it.

    All weights learn. With `copies_at_once` the copies go through in several passes: less memory,
    a third more time. `prior_strength` N lets BatchNorm normalise by N parts of the stored
    statistics and one of the pass's; null: by the stored ones alone.
    """

    shared_images: SharedImages = "alone"

    def __init__(
        self,
        *,
        model: CombinedModel,
        copies: int,
        copies_at_once: int | None,
        prior_strength: int | None,
    ) -> None:
        counts = [each for each in (copies, copies_at_once) if each is not None]
        if min(counts) < 1 or (prior_strength is not None and prior_strength < 0):
            raise SegmillError(
                f"tta.method: copies={copies}, copies_at_once={copies_at_once} should be above 0 "
                f"(the latter may be null), and prior_strength={prior_strength} not below 0."
            )
        self.model = model
        self.copies, self.copies_at_once = copies, copies_at_once
        self.prior_strength = prior_strength
        self._classifies: bool | None = None
        self.reset()

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """All of the discriminative model, whatever `model.update` says."""
        named = self.model.named_parameters()
        return {name: each for name, each in named if name.startswith(DISCRIMINATIVE)}

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from each image by itself; the logits are those after its step."""
        parameters = self.parameters_to_update()
        if self._source is None:
            self._source = WeightSet(parameters)
        logits, losses = [], []
        for alone, draws in views.each(generator):
            losses.append(self._learn(alone.image[0], updater, draws))
            with torch.no_grad():
                logits.append(self._logits(alone.image))
            self._source.put_into(parameters)
            updater.forget()
        self._last = views, torch.cat(logits)
        return self._last[1], torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """What `adapt` said of the same images just now; of others, the source's logits."""
        if self._last is not None and self._last[0] is views:
            return self._last[1]
        return torch.cat([self._logits(image) for image in views.image.split(1)])

    def reset(self) -> None:
        """Forget the last images; the weights at the next one are the source's."""
        self._source: WeightSet | None = None
        self._statistics: MixedStatistics | None = None
        self._last: tuple[Views, Float[Tensor, "B K h w"]] | None = None

    def _learn(
        self, image: UInt8[Tensor, "C H W"], updater: Updater, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        aligned = not self._is_classifier(image)
        copies, mirrored = augmix_copies(image, self.copies, generator, aligned=aligned)
        at_once = self.copies_at_once or self.copies
        if at_once >= self.copies:
            loss = marginal_entropy(_turned_back(self._logits(copies), mirrored))
            updater.backward(loss)
        else:
            loss = self._backward_in_parts(copies, mirrored, at_once, updater)
        updater.step()
        return loss.detach()

    def _backward_in_parts(
        self,
        copies: Float[Tensor, "N C H W"],
        mirrored: Bool[Tensor, " N"],
        at_once: int,
        updater: Updater,
    ) -> Float[Tensor, ""]:
        """All logits first, then each part again with the gradient of its logits."""
        parts = copies.split(at_once)
        with torch.no_grad():
            leaf = torch.cat([self._logits(part) for part in parts])
        leaf.requires_grad_()
        loss = marginal_entropy(_turned_back(leaf, mirrored))
        (gradient,) = torch.autograd.grad(loss, leaf)
        for part, of_part in zip(parts, gradient.split(at_once), strict=True):
            updater.backward((self._logits(part) * of_part).sum())
        return loss

    def _is_classifier(self, image: UInt8[Tensor, "C H W"]) -> bool:
        """Whether an image has one prediction, asked once."""
        if self._classifies is None:
            with torch.no_grad():
                self._classifies = self._logits(image[None]).shape[2:] == (1, 1)
        return self._classifies

    def _logits(
        self, image: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B K h w"]:
        with self._normalisation():
            return self.model.discriminative(image)

    @contextmanager
    def _normalisation(self) -> Iterator[None]:
        if self.prior_strength is None:
            yield
            return
        if self._statistics is None:
            share = 1 / (self.prior_strength + 1)
            network = self.model.discriminative.network
            # As there: the variance is unbiased, and no gradient goes through the statistics.
            self._statistics = MixedStatistics(network, share=share, correction=1, gradient=False)
        with self._statistics.mixed(keep=False):
            yield


def marginal_entropy(logits: Float[Tensor, "N K h w"]) -> Float[Tensor, ""]:
    """Entropy of the N copies' mean probability, in nats; mean over pixels where there are any."""
    log_prob = logits.float().log_softmax(dim=1).logsumexp(dim=0) - torch.tensor(len(logits)).log()
    log_prob = log_prob.clamp(min=torch.finfo(log_prob.dtype).min)
    return -(log_prob.exp() * log_prob).sum(dim=0).mean()


def _turned_back(
    logits: Float[Tensor, "N K h w"], mirrored: Bool[Tensor, " N"]
) -> Float[Tensor, "N K h w"]:
    return torch.where(mirrored.view(-1, 1, 1, 1), logits.flip(3), logits)
