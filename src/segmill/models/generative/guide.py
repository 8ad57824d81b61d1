"""Guide: what adaptation asks of a generative model, whatever it predicts.

Noise, velocity and clean data are affine in the score at a fixed noisy latent and time, so guides
of all three kinds are used alike (DUSA, NeurIPS 2024). Time is the share of noise here, 0 = data
and 1 = noise; a guide that counts otherwise converts inside.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from segmill.models.guide_view import GuideView


@runtime_checkable
class Guide(Protocol):
    """A conditional diffusion or flow model of images.

    `cell` is the width of a latent cell in pixels, `network` what may be trained and adapted. The
    class `num_classes` means "no condition".
    """

    num_classes: int
    cell: int
    view: GuideView
    network: nn.Module

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of `network`, which are compiled and sharded one by one."""
        ...

    def fill(self, device: torch.device) -> None:
        """Give memory and values to the parameters of `network` that are on the meta device."""
        ...

    def encode(
        self, window: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N C h w"]:
        """Latents, in the guide's scale, of pixels in 0..255; without gradient."""
        ...

    def noisy(
        self,
        latent: Float[Tensor, "N C h w"],
        noise: Float[Tensor, "N C h w"],
        t: Float[Tensor, " N"],
    ) -> tuple[Float[Tensor, "N C h w"], Float[Tensor, "N C h w"]]:
        """The noisy latent at time `t`, and what `predict` should say of it."""
        ...

    def predict(
        self,
        noisy_latent: Float[Tensor, "N C h w"],
        t: Float[Tensor, " N"],
        classes: Int64[Tensor, "N M"],
    ) -> Float[Tensor, "N M C h w"]:
        """The prediction under each of M classes a window."""
        ...


@runtime_checkable
class MixingGuide(Guide, Protocol):
    """A guide whose condition is a vector a class, so that classes can be mixed before it runs."""

    def predict_mixed(
        self,
        noisy_latent: Float[Tensor, "N C h w"],
        t: Float[Tensor, " N"],
        classes: Int64[Tensor, "N M"],
        weights: Float[Tensor, "N M"],
    ) -> Float[Tensor, "N C h w"]:
        """The prediction under one condition: the weighted sum of the classes' vectors."""
        ...
