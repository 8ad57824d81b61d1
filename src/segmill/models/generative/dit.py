"""DiT as a guide: a diffusion of 1000 steps; the prediction is the noise.

Paper:   Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023,
         https://arxiv.org/abs/2212.09748; the guide of DUSA (NeurIPS 2024) for classification.
Follows: facebookresearch/DiT; of its eight output channels the first four are the noise.
Weights: DiT-XL-2-256x256.pt, and others of the repository.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from segmill.models.generative.codec import Codec
from segmill.models.generative.guide_parts import check_sizes, fill_guide, missing_files, waiting
from segmill.models.generative.transformer import DiffusionTransformer, Latent
from segmill.models.guide_view import GuideView

STEPS = 1000
BETAS = (1e-4, 0.02)  # rise evenly over the steps


class DiTGuide(nn.Module):
    """Time t is step round(1000 t).

    `weights` is a file or `random`, and is read by `fill`.
    """

    signal: Float[Tensor, " S"]  # share of the image's variance that is left after each step

    def __init__(
        self,
        *,
        network: DiffusionTransformer,
        codec: Codec,
        view: GuideView,
        weights: str | None,
    ) -> None:
        super().__init__()
        check_sizes(network, codec, view)
        self.num_classes, self.cell, self.view = network.num_classes, codec.cell, view
        self.weights = weights
        self.network = waiting(network, weights)
        self.codec = codec
        kept = 1 - torch.linspace(*BETAS, STEPS, dtype=torch.float64)
        self.register_buffer("signal", kept.cumprod(dim=0).float(), persistent=False)

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
        """The latent after as many steps, and the noise in it."""
        signal = self.signal[_step(t)].view(-1, 1, 1, 1)
        return signal.sqrt() * latent + (1 - signal).sqrt() * noise, noise

    def predict(
        self, noisy_latent: Latent, t: Float[Tensor, " N"], classes: Int64[Tensor, "N M"]
    ) -> Float[Tensor, "N M C h w"]:
        """The noise, under each of M classes a window."""
        count = classes.shape[1]
        noise = self.network(
            noisy_latent.repeat_interleave(count, dim=0),
            _step(t).float().repeat_interleave(count),
            classes.flatten(),
        )
        return noise.unflatten(0, classes.shape)

    def predict_mixed(
        self,
        noisy_latent: Latent,
        t: Float[Tensor, " N"],
        classes: Int64[Tensor, "N M"],
        weights: Float[Tensor, "N M"],
    ) -> Latent:
        """The noise, under one condition: the weighted sum of the classes' vectors."""
        return self.network(noisy_latent, _step(t).float(), classes, weights)


def _step(t: Float[Tensor, " N"]) -> Int64[Tensor, " N"]:
    return (t * STEPS).round().long().clamp(max=STEPS - 1)
