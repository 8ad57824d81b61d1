"""Optimizers of torch, their parameter groups by name, and a schedule at work on one.

Settings are what a file in configs/optim says; `build` makes the torch object. The rules by name
are in `parameter_rules`, the schedules' formulas in `schedules`: neither needs torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from segmill.parameter_rules import ParameterRules
from segmill.schedules import LaggedPoly, MultiStep, Poly, Schedule

# The schedules are named here too: the configurations of older runs do so.
__all__ = [
    "SGD",
    "AdamW",
    "LaggedPoly",
    "MultiStep",
    "OptimizerSettings",
    "Poly",
    "StepSchedule",
    "norm_parameters",
]

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def norm_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that belong to normalisation layers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, NORMS)
        for name, _ in layer.named_parameters(recurse=False)
    }


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(ParameterRules, ABC):
    """What every optimizer of torch has in common."""

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """One group for each (learning rate, weight decay) that occurs; `params`: (name, tensor).

        What is frozen, by the module or by these settings, is in none and has no gradient. A rule
        that names no parameter is reported.
        """
        parameters = dict(module.named_parameters())
        self.warn_of_unused(parameters, network=type(module).__name__)
        for name, parameter in parameters.items():
            if self.is_frozen(name):
                parameter.requires_grad_(False)
        updated = [name for name, parameter in parameters.items() if parameter.requires_grad]
        groups = self.grouped(updated, norm_names=norm_parameters(module))
        return [
            {
                "params": [(name, parameters[name]) for name in names],
                "lr": lr,
                "weight_decay": weight_decay,
            }
            for (lr, weight_decay), names in groups.items()
        ]

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
        return _as_others_are(optimizer)


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
        return _as_others_are(optimizer)


def _as_others_are(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What a fused optimizer does otherwise than one that is not fused, undone.

    It announces that it unscales gradients inside the step, and then Lightning refuses to clip them
    under every mixed precision, bf16 included, where nothing is scaled at all. And its weights keep
    their versions: whoever holds copies of them (tta/cuda_graphs.py) would not see the step.
    """
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.register_step_post_hook(_count_versions)
    return optimizer


def _count_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        changed = [each for each in group["params"] if each.grad is not None]
        increment_version([each for each in changed if not isinstance(each, DTensor)])


class StepSchedule(LRScheduler):
    """A schedule at work on an optimizer. Its state is the number of steps taken."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: Schedule, *, max_steps: int
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
