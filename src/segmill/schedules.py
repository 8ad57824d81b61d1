"""Learning-rate schedules: the rate of every optimizer step, by formula. No framework.

Follows MMEngine 0.10.7 (LinearLR warm-up, PolyLR, MultiStepLR, each counted in optimizer steps)
and, for `LaggedPoly`, the official DFormer code. A run that goes on needs nothing but its step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """What a file in configs/optim says of the learning rate."""

    warmup_steps: int

    @abstractmethod
    def rate(self, base: float, step: int, max_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of a group whose own rate is `base`."""


@dataclass(frozen=True, kw_only=True)
class AfterWarmup(Schedule):
    """Linear warm-up from `warmup_factor` of the rate, then what the subclass says."""

    warmup_factor: float

    def rate(self, base: float, step: int, max_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of a group whose own rate is `base`."""
        if step < self.warmup_steps:
            done = step / max(self.warmup_steps - 1, 1)
            return base * (self.warmup_factor + (1 - self.warmup_factor) * done)
        return self.after_warmup(base, step - self.warmup_steps, max_steps - self.warmup_steps)

    @abstractmethod
    def after_warmup(self, base: float, step: int, steps: int) -> float:
        """Rate of step `step` of the `steps` that follow the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Poly(AfterWarmup):
    """(1 - progress) ** power from the group's rate down to `min_lr` at the last step.

    `min_lr` is absolute and the same for every group, whatever its lr_mult.
    """

    power: float
    min_lr: float

    def after_warmup(self, base: float, step: int, steps: int) -> float:
        """Reach `min_lr` with the last step itself, not one later."""
        left = max(1 - step / max(steps - 1, 1), 0.0)
        return (base - self.min_lr) * left**self.power + self.min_lr


@dataclass(frozen=True, kw_only=True)
class MultiStep(AfterWarmup):
    """Multiply the rate by `gamma` at each of `milestones`, counted from the warm-up's end."""

    milestones: Sequence[int]
    gamma: float

    def after_warmup(self, base: float, step: int, steps: int) -> float:  # noqa: ARG002
        """As often as milestones have been reached."""
        return base * self.gamma ** sum(step >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class LaggedPoly(Schedule):
    """The official DFormer recipe: warm-up from 0, poly decay measured from step 0, one step late.

    Its loop sets the rate after the optimizer's step: step 0 has the full rate, step 1 has rate 0,
    step k that of k - 1. Because the decay counts from 0, the rate drops where the warm-up ends.
    """

    power: float

    def rate(self, base: float, step: int, max_steps: int) -> float:
        """Learning rate that step `step` uses."""
        return base if step == 0 else self.unlagged(base, step - 1, max_steps)

    def unlagged(self, base: float, step: int, max_steps: int) -> float:
        """The schedule itself: linear from 0 over the warm-up, then (1 - step / max) ** power."""
        if step < self.warmup_steps:
            return base * step / self.warmup_steps
        return base * (1 - step / max_steps) ** self.power
