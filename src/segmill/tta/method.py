"""What the harness asks of an adaptation method, and what it gives it."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segmill.draws import Generators


@dataclass(frozen=True)
class Views:
    """Images as both models take them, pixels in 0..255.

    `image` is resized by the evaluation protocol, for the discriminative model; `original` has the
    file's size, and the guide resizes it for itself. `seeds`, one for each image, are for what is
    drawn for it alone; without them it is drawn as the step's own draws are. `weight` is what their
    mean loss counts in the step, where several batches, or processes' images, make one.
    """

    image: UInt8[Tensor, "B C H W"]
    original: UInt8[Tensor, "B C _H _W"]
    seeds: tuple[int, ...] = ()
    weight: float = 1.0

    def generators(self, of_step: torch.Generator) -> Generators:
        """Of the images' own draws, so that these do not depend on the others in the batch."""
        if not self.seeds:
            return of_step
        return [torch.Generator(of_step.device).manual_seed(seed) for seed in self.seeds]

    def each(self, of_step: torch.Generator) -> list[tuple["Views", torch.Generator]]:
        """Image by image, with the generator of its draws; weights are left out."""
        found = self.generators(of_step)
        generators = [found] * len(self.image) if isinstance(found, torch.Generator) else found
        pairs = zip(self.image.split(1), self.original.split(1), strict=True)
        return [
            (Views(image=image, original=original), generator)
            for (image, original), generator in zip(pairs, generators, strict=True)
        ]


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


@runtime_checkable
class Accumulates(Protocol):
    """A method whose step may wait for further batches, and for other processes' images.

    What it gives to `backward` is `views.weight` times the mean over the images. `adapt` asks for
    one step at most, after its last `backward`, never for `zero_grad` or `forget`, and does the
    same whether or not the weights have changed when `step` returns. What it keeps for itself is
    each process's own.
    """

    accumulates: bool


@runtime_checkable
class Waits(Protocol):
    """A method that learns nothing of its first `waits_for` images, nor after a `reset`."""

    @property
    def waits_for(self) -> int:
        """Images; 0: none."""
        ...


SharedImages = Literal["together", "unsharded", "alone", "never"]


@runtime_checkable
class SharesImages(Protocol):
    """A method that says what becomes of it where every process has other images.

    `together`: processes learn one set of weights. What is given to `backward` is averaged over
    them, so each makes the same passes, whatever it sees; draws of the step itself do not depend
    on how many images a process has. That is so of methods that say nothing. `unsharded`: one set
    of weights too, but the number of passes depends on a process's images, so each has all weights.
    `alone`: each image is learnt by itself, from the source; processes do not wait for each other
    and have all weights. `never`: the steps do not fit together.
    """

    shared_images: SharedImages
