"""SAR: entropy of what is reliable only, at weights from where every direction leads down.

Paper:   Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023,
         https://arxiv.org/abs/2302.12400
Follows: the paper and its public code, whose numbers are in configs/tta/sar.yaml. There an image is
         reliable or not; so it is here for a classifier, and for segmentation a pixel is. After a
         recovery the moving average starts anew; the public code means to do so too, but writes
         the old value back.
"""

import logging
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel
from segmill.tta.entropy import pixel_entropy
from segmill.tta.method import Updater, Views
from segmill.tta.norm_layers import norm_layers
from segmill.tta.selection import selected_mean
from segmill.tta.sharding import local
from segmill.tta.weight_sets import WeightSet, in_place

log = logging.getLogger(__name__)


class SAR:
    """One sharpness-aware step a batch on the mean entropy, at the logits' own stride.

    Images (of segmentation: pixels) with an entropy below `entropy_share` x ln K count. The
    gradient is taken at distance `rho` from the weights, in the direction in which the entropy
    grows. Once the moving average (`memory` of it is kept) falls below `recover_below` nats the
    model has collapsed, and weights and optimizer start from the source again.

    `frozen_share` of the normalisation layers, those next to the logits, are not updated. The
    paper leaves out the top of the network as too sensitive: the last of ResNet's four stages, the
    last three of ViT's twelve blocks, and the final norm. A share says the same of any network.
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        entropy_share: float,
        rho: float,
        recover_below: float,
        memory: float,
        frozen_share: float,
    ) -> None:
        if not 0 <= frozen_share < 1:
            raise SegmillError(
                f"tta.method.frozen_share={frozen_share} should be a share from 0 to below 1; "
                "with 1 no layer would be left to update."
            )
        self.model = model
        self.entropy_share, self.rho = entropy_share, rho
        self.recover_below, self.memory = recover_below, memory
        layers = norm_layers(model)
        updated = layers[: len(layers) - int(frozen_share * len(layers))]
        self._names = {name for layer in updated for name in layer}
        self._source: WeightSet | None = None
        self._average: float | None = None

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """Scale and shift of the normalisation layers that are not frozen."""
        return {name: each for name, each in self.model.named_parameters() if name in self._names}

    def adapt(
        self,
        views: Views,
        updater: Updater,
        generator: torch.Generator,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from a batch; where nothing is reliable nothing is learnt, and the loss is 0."""
        parameters = self.parameters_to_update()
        if self._source is None:
            self._source = WeightSet(parameters)
        logits = self.model.discriminative(views.image)
        margin = self.entropy_share * math.log(logits.shape[1])
        entropy = pixel_entropy(logits)
        reliable = entropy.detach() < margin
        loss, _ = selected_mean(entropy, reliable)
        updater.backward(loss)

        before = WeightSet(parameters)
        _climb(parameters, self.rho)
        updater.zero_grad()
        entropy = pixel_entropy(self.model.discriminative(views.image))
        still_reliable = reliable & (entropy.detach() < margin)
        climbed_loss, still = selected_mean(entropy, still_reliable)
        updater.backward(climbed_loss)
        before.put_into(parameters)

        # One wait for the device; all processes have run the same passes, whatever comes out.
        count, value = torch.stack([still, climbed_loss.detach()]).tolist()
        if count > 0:
            updater.step()
            self._recover_after(value, parameters, updater)
        else:
            updater.zero_grad()
        return logits.detach(), loss.detach()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the discriminative model."""
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Forget the moving average; the weights at the next image are the source's."""
        self._source, self._average = None, None

    def _recover_after(
        self, loss: float, parameters: dict[str, nn.Parameter], updater: Updater
    ) -> None:
        """Count the loss in; start from the source when the average is too small."""
        old = loss if self._average is None else self._average
        self._average = self.memory * old + (1 - self.memory) * loss
        if self._average < self.recover_below:
            assert self._source is not None
            log.info("SAR: mean entropy %.3f, weights of the source again.", self._average)
            self._source.put_into(parameters)
            updater.forget()
            self._average = None


@torch.no_grad()
def _climb(parameters: dict[str, nn.Parameter], rho: float) -> None:
    """Move by `rho` in all, along the gradients."""
    gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
    norm = get_total_norm(gradients.values())
    scale = rho / ((norm.full_tensor() if isinstance(norm, DTensor) else norm) + 1e-12)
    weights = in_place(parameters)
    for name, gradient in gradients.items():
        weights[name].addcmul_(local(gradient), scale)
