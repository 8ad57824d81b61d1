"""EATA: entropy of what is reliable and unlike what was seen, the surer the more it counts.

Paper:   Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022,
         https://arxiv.org/abs/2204.02610
Follows: the paper and its public code, whose numbers are in configs/tta/eata.yaml. Without a
         Fisher penalty it is what the paper calls ETA, and needs no clean images; `fisher`
         (configs/tta/eata_fisher.yaml) takes the first images of the stream in their place. For
         segmentation a pixel is what an image is there.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segmill.models.combined import CombinedModel
from segmill.tta.entropy import pixel_entropy
from segmill.tta.fisher import Fisher
from segmill.tta.method import Updater, Views
from segmill.tta.norm_layers import norm_layers
from segmill.tta.selection import over_processes, selected_mean


class EATA:
    """One step a batch on the weighted entropy of the images that are worth it.

    Those have an entropy H below E0 = `entropy_share` x ln K, and probabilities whose cosine with
    the moving average of all that counted before (`memory` of it is kept) is below `redundancy`.
    Their weight is exp(E0 - H). Scale and shift of the normalisation layers learn.
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        entropy_share: float,
        redundancy: float,
        memory: float,
        fisher: Fisher | None,
    ) -> None:
        self.model = model
        self.entropy_share, self.redundancy, self.memory = entropy_share, redundancy, memory
        self.fisher = fisher
        self._names = {name for layer in norm_layers(model) for name in layer}
        self._average: Float[Tensor, " K"] | None = None

    @property
    def waits_for(self) -> int:
        """The images of the Fisher penalty."""
        return 0 if self.fisher is None else self.fisher.images

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """Scale and shift of all normalisation layers of the discriminative model."""
        return {name: each for name, each in self.model.named_parameters() if name in self._names}

    def adapt(
        self,
        views: Views,
        updater: Updater,
        generator: torch.Generator,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from a batch; where nothing is worth it nothing is learnt, and the loss is 0."""
        logits = self.model.discriminative(views.image)
        if self.fisher is not None and self.fisher.gathers:
            return logits.detach(), self._gather(self.fisher, views, logits, updater)
        margin = self.entropy_share * math.log(logits.shape[1])
        entropy = pixel_entropy(logits)
        prob = logits.detach().float().softmax(dim=1)
        chosen = self._unlike_the_average(prob) & (entropy.detach() < margin)
        weight = (margin - entropy.detach()).exp()
        loss, count = selected_mean(weight * entropy, chosen)
        anything = float(count) > 0  # the same on every process
        if anything and self.fisher is not None:
            loss = loss + self.fisher.penalty(self.parameters_to_update())
        # Also with a gradient of 0: every process does the same passes.
        updater.backward(loss)
        if anything:
            updater.step()
            self._count_in(prob, chosen, count)
        else:
            updater.zero_grad()
        return logits.detach(), loss.detach()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the discriminative model."""
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Forget the moving average and what Fisher has gathered."""
        self._average = None
        if self.fisher is not None:
            self.fisher.reset()

    def _gather(
        self, fisher: Fisher, views: Views, logits: Float[Tensor, "B K h w"], updater: Updater
    ) -> Float[Tensor, ""]:
        """The gradients of this batch, for Fisher alone; returns the loss that they are of."""
        loss = F.cross_entropy(logits.float(), logits.argmax(dim=1))
        updater.backward(loss * views.weight)
        images = logits.new_tensor(float(len(logits)))
        if not self.model.shares_classes:
            images = over_processes(images)
        fisher.gather(self.parameters_to_update(), images=int(images))
        updater.zero_grad()
        return loss.detach()

    def _unlike_the_average(self, prob: Float[Tensor, "B K h w"]) -> Bool[Tensor, "B h w"]:
        """Everything at first, when there is no average yet."""
        if self._average is None:
            return torch.ones_like(prob[:, 0], dtype=torch.bool)
        cosine = F.cosine_similarity(prob, self._average.view(1, -1, 1, 1), dim=1)
        return cosine.abs() < self.redundancy

    def _count_in(
        self,
        prob: Float[Tensor, "B K h w"],
        chosen: Bool[Tensor, "B h w"],
        count: Float[Tensor, ""],
    ) -> None:
        """Let the moving average go on with the mean of what counted, on all processes."""
        mean = over_processes((prob * chosen[:, None]).sum(dim=(0, 2, 3))) / count
        if self._average is None:
            self._average = mean
        else:
            self._average = self.memory * self._average + (1 - self.memory) * mean
