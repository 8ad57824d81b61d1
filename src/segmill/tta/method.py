"""What the harness asks of an adaptation method, and what it gives it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


@dataclass(frozen=True)
class Views:
    """One image as both models take it, pixels in 0..255.

    `image` is resized by the evaluation protocol, for the discriminative model; `original` has the
    file's size, and the guide resizes it for itself.
    """

    image: UInt8[Tensor, "B C H W"]
    original: UInt8[Tensor, "B C _H _W"]


@runtime_checkable
class Updater(Protocol):
    """The optimizer, as far as a method sees it."""

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the loss's gradients to those that are there."""
        ...

    def step(self) -> None:
        """Update the weights, then forget the gradients."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def forget(self) -> None:
        """Forget what the optimizer has gathered over its steps: go on as a new one would."""
        ...


@runtime_checkable
class Method(Protocol):
    """One way to adapt a model to the images it sees."""

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """What the optimizer gets, by the names of `CombinedModel.named_parameters`."""
        ...

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from one image; returns the logits from before the update, and the loss."""
        ...

    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the model as it is now."""
        ...

    def reset(self) -> None:
        """Forget what the method itself keeps; weights are put back by the harness."""
        ...
