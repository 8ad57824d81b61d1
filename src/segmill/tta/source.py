"""Source: the discriminative model as it was trained. What every other method is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.combined import CombinedModel
from segmill.tta.method import Updater, Views


class Source:
    """Updates nothing; there is no loss, so it is 0."""

    def __init__(self, *, model: CombinedModel) -> None:
        self.model = model

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """None."""
        return {}

    def adapt(
        self,
        views: Views,
        updater: Updater,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Predict."""
        logits = self.predict(views)
        return logits, logits.new_zeros(())

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the discriminative model."""
        return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Nothing is kept between images."""
