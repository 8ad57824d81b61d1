"""ClassMemory: a few images of the past, of every class alike, the newer and surer ones.

Paper:   Yuan et al. (RoTTA), CVPR 2023, section 3.2, https://arxiv.org/abs/2303.13899
Follows: its public code, which calls it CSTU.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass
class Remembered:
    """An image, how unsure its prediction was (nats), and how many images have come since."""

    image: UInt8[Tensor, "C H W"]
    entropy: float
    age: int = 0


class ClassMemory:
    """At most `capacity` images, by the class that was predicted.

    The penalty of an image grows with its age and its entropy, weighted; the one with the largest
    makes room for a new image of a smaller one: of the same class where that has its share of the
    memory, else of the classes with the most images.
    """

    def __init__(
        self, *, capacity: int, num_classes: int, age_weight: float, entropy_weight: float
    ) -> None:
        self.capacity, self.num_classes = capacity, num_classes
        self.age_weight, self.entropy_weight = age_weight, entropy_weight
        self._classes: dict[int, list[Remembered]] = {}

    def add(self, image: UInt8[Tensor, "C H W"], predicted: int, entropy: float) -> None:
        """Remember the image if there is room; all images grow older by one."""
        new = Remembered(image, entropy)
        if self._makes_room(predicted, self._penalty(new)):
            self._classes.setdefault(predicted, []).append(new)
        for each in self._all():
            each.age += 1

    def content(self) -> tuple[UInt8[Tensor, "N C H W"], Float[Tensor, " N"]]:
        """All images, class by class, and their ages in units of the capacity."""
        items = list(self._all())
        images = torch.stack([each.image for each in items])
        ages = torch.tensor([each.age / self.capacity for each in items], device=images.device)
        return images, ages

    def _all(self) -> Iterable[Remembered]:
        return (each for _, items in sorted(self._classes.items()) for each in items)

    def _penalty(self, item: Remembered) -> float:
        by_age = 1 / (1 + math.exp(-item.age / self.capacity))
        return self.age_weight * by_age + self.entropy_weight * item.entropy / math.log(
            self.num_classes
        )

    def _makes_room(self, predicted: int, penalty: float) -> bool:
        """Whether there is room, after dropping an image where it takes that."""
        own = self._classes.get(predicted, [])
        if len(own) >= self.capacity / self.num_classes:
            return self._drops_worse([predicted], penalty)
        sizes = {each: len(items) for each, items in sorted(self._classes.items())}
        if sum(sizes.values()) < self.capacity:
            return True
        most = max(sizes.values())
        return self._drops_worse([each for each, size in sizes.items() if size == most], penalty)

    def _drops_worse(self, classes: list[int], penalty: float) -> bool:
        """Drop the image with the largest penalty, the last of equals, if it is above `penalty`."""
        candidates = [(each, item) for each in classes for item in self._classes[each]]
        penalties = [self._penalty(item) for _, item in candidates]
        largest = max(penalties)
        if largest <= penalty:
            return False
        index = max(i for i, each in enumerate(penalties) if each == largest)
        of_class, item = candidates[index]
        self._classes[of_class] = [each for each in self._classes[of_class] if each is not item]
        return True
