"""BN: BatchNorm layers use the statistics of the batch itself; no weight changes.

Papers:  Schneider et al., "Improving robustness against common corruptions by covariate shift
         adaptation", NeurIPS 2020, https://arxiv.org/abs/2006.16971, without the source's share in
         the statistics (N = 0); Nado et al. 2020, https://arxiv.org/abs/2006.10963.
Follows: the papers' idea; of segmentation the pixels of one image are the batch.
"""

import logging

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segmill.models.combined import CombinedModel
from segmill.tta.method import Updater, Views

log = logging.getLogger(__name__)


class BN:
    """Updates nothing and has no loss; `tta.batch_statistics: true` is the whole method.

    Nothing is remembered: each batch is normalised by itself alone.
    """

    def __init__(self, *, model: CombinedModel) -> None:
        self.model = model
        network = model.discriminative.network
        if not any(isinstance(layer, _BatchNorm) for layer in network.modules()):
            log.warning(
                "tta=bn gives the same as tta=source: %s has no BatchNorm layer.",
                type(network).__name__,
            )

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """None."""
        return {}

    def adapt(
        self,
        views: Views,
        updater: Updater,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Predict; the loss is 0."""
        logits = self.predict(views)
        return logits, logits.new_zeros(())

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the discriminative model."""
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Nothing is kept between images."""
