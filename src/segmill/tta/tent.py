"""Tent: normalisation layers learn to make the prediction surer, by its own entropy.

Paper:   Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021,
         https://arxiv.org/abs/2006.10726
Follows: the paper; the entropy is averaged over images, of segmentation over pixels. Layers are
         chosen by type, so LayerNorm, GroupNorm and RMSNorm learn too. BatchNorm by the batch's
         statistics, the paper's other half, is `tta.batch_statistics: true`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.combined import CombinedModel
from segmill.tta.entropy import pixel_entropy
from segmill.tta.method import Updater, Views
from segmill.tta.norm_layers import norm_layers


class Tent:
    """One step a batch on the mean entropy, in nats, at the logits' own stride.

    It decides itself what is updated; `model.update` and the guide have no part in it.
    """

    accumulates = True

    def __init__(self, *, model: CombinedModel) -> None:
        self.model = model
        self._names = {name for layer in norm_layers(model) for name in layer}

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """Scale and shift of all normalisation layers of the discriminative model."""
        return {name: each for name, each in self.model.named_parameters() if name in self._names}

    def adapt(
        self,
        views: Views,
        updater: Updater,
        generator: torch.Generator,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from a batch."""
        logits = self.model.discriminative(views.image)
        loss = pixel_entropy(logits).mean()
        updater.backward(loss * views.weight)
        updater.step()
        return logits.detach(), loss.detach()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the discriminative model."""
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Nothing is kept between images."""
