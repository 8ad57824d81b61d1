"""Exported: the module that a file for other programs holds. Pixels in, logits or classes out."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from segmill.models.discriminative import Discriminative


class Exported(nn.Module):
    """Normalisation, network and, for `label`, upsampling and argmax in one graph.

    Images are RGB (with depth as the fourth channel for models that take it), 0 to 255, float32.
    """

    def __init__(
        self, model: Discriminative, *, output: Literal["logits", "label"], align_corners: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.align_corners = align_corners

    def forward(
        self, image: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B K _h _w"] | Int[Tensor, "B H W"]:
        logits = self.model(image)
        if self.output == "logits":
            return logits
        if logits.shape[-2:] != image.shape[-2:]:
            size = image.shape[-2:]
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)
        return logits.argmax(1)
