"""SiT as a guide: a flow on a straight path from data to noise; the prediction is its velocity.

Paper:   Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
         Interpolant Transformers", ECCV 2024, https://arxiv.org/abs/2401.08740; Yu et al.,
         "Representation Alignment for Generation" (REPA), ICLR 2025,
         https://arxiv.org/abs/2410.06940
Follows: sihyun-yu/REPA (path `linear`: time 1 is noise) and willisma/SiT (`reverse_linear`: time
         1 is data). Of their paths only these are offered.
Weights: both repositories' files, and the run folder of a guide trained here.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from segmill.models.generative.codec import Codec
from segmill.models.generative.guide_parts import (
    check_sizes,
    fill_guide,
    missing_files,
    waiting,
)
from segmill.models.generative.transformer import DiffusionTransformer, Latent
from segmill.models.guide_view import GuideView


class SiTGuide(nn.Module):
    """The target is noise minus data, whatever the direction in which the weights count time.

    `weights` is a file, a run folder or `random`, and is read by `fill`; null keeps the values that
    `network` was built with, for training.
    """

    def __init__(
        self,
        *,
        network: DiffusionTransformer,
        codec: Codec,
        view: GuideView,
        path: Literal["linear", "reverse_linear"],
        weights: str | None,
    ) -> None:
        super().__init__()
        check_sizes(network, codec, view)
        self.num_classes, self.cell, self.view = network.num_classes, codec.cell, view
        self.reverse = path == "reverse_linear"
        self.weights = weights
        self.network = waiting(network, weights)
        self.codec = codec

    @staticmethod
    def missing(*, weights: str | None, codec: Mapping[str, Any], **_: Any) -> list[str]:
        """What its settings name and this machine lacks, one paragraph each."""
        return missing_files(weights, codec)

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks."""
        return list(self.network.blocks)

    def fill(self, device: torch.device) -> None:
        """Give memory and values to a network that was left for later."""
        if self.weights is not None and next(self.network.parameters()).is_meta:
            fill_guide(self.network, self.codec, self.weights, device)

    def encode(
        self, window: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N C h w"]:
        """Latents of pixels in 0..255; without gradient."""
        return self.codec.encode(window)

    def noisy(self, latent: Latent, noise: Latent, t: Float[Tensor, " N"]) -> tuple[Latent, Latent]:
        """The latent on its way to the noise, and the velocity of that way."""
        share = t.view(-1, 1, 1, 1)
        return (1 - share) * latent + share * noise, noise - latent

    def predict(
        self, noisy_latent: Latent, t: Float[Tensor, " N"], classes: Int64[Tensor, "N M"]
    ) -> Float[Tensor, "N M C h w"]:
        """Velocities from data to noise, under each of M classes a window."""
        count = classes.shape[1]
        time = 1 - t if self.reverse else t
        velocity = self.network(
            noisy_latent.repeat_interleave(count, dim=0),
            time.repeat_interleave(count),
            classes.flatten(),
        )
        return (-velocity if self.reverse else velocity).unflatten(0, classes.shape)

    def predict_mixed(
        self,
        noisy_latent: Latent,
        t: Float[Tensor, " N"],
        classes: Int64[Tensor, "N M"],
        weights: Float[Tensor, "N M"],
    ) -> Latent:
        """Velocities under one condition: the weighted sum of the classes' vectors."""
        velocity = self.network(noisy_latent, 1 - t if self.reverse else t, classes, weights)
        return -velocity if self.reverse else velocity
