"""Fisher: how much each weight matters to the source's predictions, and a penalty for leaving it.

Paper:   Niu et al. (EATA), ICML 2022, section 4.2, https://arxiv.org/abs/2204.02610
Follows: its public code: squares of the gradient of a batch's mean cross-entropy with the model's
         own labels, averaged over batches. There the images are clean ones.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segmill.errors import SegmillError
from segmill.tta.selection import over_processes
from segmill.tta.sharding import local
from segmill.tta.weight_sets import WeightSet


class Fisher:
    """Takes the first `images` images of the stream, while nothing is learnt yet.

    `strength` times the weighted squared distance from the source's weights is added to the loss.
    """

    def __init__(self, *, images: int, strength: float) -> None:
        if images < 1 or strength <= 0:
            raise SegmillError(
                f"tta.method.fisher: images={images} and strength={strength} should be above 0. "
                "tta.method.fisher=null leaves the penalty out."
            )
        self.images, self.strength = images, strength
        self.reset()

    def reset(self) -> None:
        """Gather anew."""
        self._seen, self._batches = 0, 0
        self._squares: dict[str, Tensor] = {}
        self._source: WeightSet | None = None

    @property
    def gathers(self) -> bool:
        """Whether it waits for further images."""
        return self._seen < self.images

    @torch.no_grad()
    def gather(self, parameters: dict[str, nn.Parameter], *, images: int) -> None:
        """Count in the gradients that are there, of a batch of `images`."""
        if self._source is None:
            self._source = WeightSet(parameters)
            self._squares = {name: torch.zeros_like(local(p)) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self._squares[name] += local(parameter.grad).square()
        self._seen += images
        self._batches += 1

    def penalty(self, parameters: dict[str, nn.Parameter]) -> Float[Tensor, ""]:
        """Of the weights as they are; of sharded ones the gradient is of this process's part."""
        assert self._source is not None
        assert not self.gathers
        terms = [
            (self._squares[name] * (local(each) - self._source[name]).square()).sum()
            for name, each in parameters.items()
        ]
        own = torch.stack(terms).sum() * (self.strength / self._batches)
        if any(isinstance(each, DTensor) for each in parameters.values()):
            return own + (over_processes(own) - own.detach())
        return own
