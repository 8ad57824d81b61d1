"""Parameter groups by name, optimizers and learning-rate schedules.

Follows MMEngine 0.10.7: `DefaultOptimWrapperConstructor` (paramwise_cfg), LinearLR warm-up, PolyLR
and MultiStepLR, each counted in optimizer steps. Settings are what a file in configs/optim says;
`build` makes the torch object.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from segmill.errors import SegmillError

log = logging.getLogger(__name__)

MULTIPLIERS = ("lr_mult", "decay_mult")
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    norm_names: Collection[str],
    learning_rate: float,
    weight_decay: float,
    rules: Mapping[str, Mapping[str, float]],
    norm_decay_mult: float | None,
) -> list[dict[str, Any]]:
    """One group for each (learning rate, weight decay) that occurs; `params` are (name, tensor).

    `rules` maps a part of a parameter's name to {lr_mult, decay_mult}. The longest part found
    decides, alone; among equally long ones the first in the alphabet. `norm_decay_mult` is for
    the parameters in `norm_names` that no rule names. Frozen parameters are in no group.
    """
    ordered = sorted(sorted(rules), key=len, reverse=True)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        rule = next((rules[part] for part in ordered if part in name), None)
        if rule is None and norm_decay_mult is not None and name in norm_names:
            rule = {"decay_mult": norm_decay_mult}
        rule = rule or {}
        lr = learning_rate * rule.get("lr_mult", 1.0)
        decay = weight_decay * rule.get("decay_mult", 1.0)
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append((name, parameter))
    return list(groups.values())


def norm_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that belong to normalisation layers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, NORMS)
        for name, _ in layer.named_parameters(recurse=False)
    }


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(ABC):
    """What every optimizer needs; `rules` are explained at `parameter_groups`."""

    learning_rate: float
    weight_decay: float
    rules: Mapping[str, Mapping[str, float]]
    norm_decay_mult: float | None  # null = as any other parameter

    def __post_init__(self) -> None:
        for part, rule in self.rules.items():
            if unknown := set(rule) - set(MULTIPLIERS):
                raise SegmillError(
                    f"optimizer.rules.{part} has {sorted(unknown)}; "
                    f"a rule may say {' and '.join(MULTIPLIERS)}."
                )

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of `module`; a rule that names none of its parameters is reported."""
        names = [name for name, _ in module.named_parameters()]
        for part in self.rules:
            if not any(part in name for name in names):
                log.warning(
                    "optimizer.rules.%s has no effect: no parameter of %s has this in its name.",
                    part,
                    type(module).__name__,
                )
        return parameter_groups(
            module.named_parameters(),
            norm_names=norm_parameters(module),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            rules=self.rules,
            norm_decay_mult=self.norm_decay_mult,
        )

    @abstractmethod
    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of `module`'s parameters."""


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerSettings):
    """torch.optim.AdamW with eps 1e-8."""

    betas: Sequence[float]  # two

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """One fused kernel for all parameters instead of a loop over them."""
        first, second = self.betas
        optimizer = torch.optim.AdamW(self.groups(module), betas=(first, second), fused=True)
        return _scaled_outside(optimizer)


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerSettings):
    """torch.optim.SGD without dampening."""

    momentum: float

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """One fused kernel for all parameters; a few where they are sharded."""
        groups = self.groups(module)
        # torch shards no fused SGD, as it does fused AdamW.
        sharded = any(isinstance(each, DTensor) for group in groups for _, each in group["params"])
        optimizer = torch.optim.SGD(
            groups, momentum=self.momentum, fused=not sharded, foreach=sharded
        )
        return _scaled_outside(optimizer)


def _scaled_outside(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let the gradient scaler unscale before the step, as for an optimizer that is not fused.

    Fused ones announce that they unscale inside the step, and then Lightning refuses to clip
    gradients under every mixed precision, bf16 included, where nothing is scaled at all.
    """
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(ABC):
    """Linear warm-up from `warmup_factor` of the rate, then what the subclass says."""

    warmup_steps: int
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

    def build(self, optimizer: torch.optim.Optimizer, *, max_steps: int) -> "StepSchedule":
        """Attach the schedule; call `step()` after every optimizer step."""
        return StepSchedule(optimizer, self, max_steps=max_steps)


@dataclass(frozen=True, kw_only=True)
class Poly(ScheduleSettings):
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
class MultiStep(ScheduleSettings):
    """Multiply the rate by `gamma` at each of `milestones`, counted from the warm-up's end."""

    milestones: Sequence[int]
    gamma: float

    def after_warmup(self, base: float, step: int, steps: int) -> float:  # noqa: ARG002
        """As often as milestones have been reached."""
        return base * self.gamma ** sum(step >= milestone for milestone in self.milestones)


class StepSchedule(LRScheduler):
    """A schedule at work on an optimizer. Its state is the number of steps taken."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: ScheduleSettings, *, max_steps: int
    ) -> None:
        self.settings, self.max_steps = settings, max_steps
        super().__init__(optimizer)

    def rate(self, base: float, step: int) -> float:
        """Learning rate of a group whose own rate is `base` at optimizer step `step`."""
        return self.settings.rate(base, step, self.max_steps)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Rates of the groups at the present step, from the formula: nothing accumulates."""
        return [self.rate(float(base), self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers only; the schedule itself is in the run's configuration."""
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with the rates of the present configuration."""
        self.last_epoch = state_dict["step"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
