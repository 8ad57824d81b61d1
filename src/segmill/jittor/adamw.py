"""AdamW of the Jittor runtime: torch's numbers, and a state without parameters or gradients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jittor as jt
import numpy as np

from segmill.checkpoint.training_state import require_same_parameters
from segmill.errors import SegmillError

SMALLEST = 1e-30  # of a squared gradient


class Group(TypedDict):
    """Parameters by name, and how they are updated; `lr` may be changed between steps."""

    params: dict[str, jt.Var]
    lr: float
    weight_decay: float


class AdamW:
    """Decoupled weight decay, Loshchilov and Hutter 2019. A group lists its parameters by name."""

    def __init__(
        self, groups: Sequence[Group], betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        self.groups, self.betas, self.eps = list(groups), betas, eps
        self.count = 0
        self.parameters = {name: p for group in groups for name, p in group["params"].items()}
        if len(self.parameters) != sum(len(group["params"]) for group in groups):
            raise SegmillError("A parameter is in two groups of the optimizer. Name it in one.")
        self.means = {name: _zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: _zeros_like(p) for name, p in self.parameters.items()}
        self._settle()

    def step(self, gradients: Mapping[str, jt.Var]) -> None:
        """Update every parameter of the groups by its gradient, and wait for it."""
        self.count += 1
        corrections = [1 - beta**self.count for beta in self.betas]
        for group in self.groups:
            # One array, not numbers: Jittor compiles kernels for the values of some numbers.
            shrink = 1 - group["lr"] * group["weight_decay"]
            rate = group["lr"] / corrections[0]
            factors = jt.array(np.array([shrink, rate, math.sqrt(corrections[1])], np.float32))
            factors.stop_grad()
            for name, parameter in group["params"].items():
                self._update(name, parameter, gradients[name], factors)
        self._settle()

    def _settle(self) -> None:
        """Compute what is pending, so that each step starts from the same graph: plain values.

        What was assigned without gradients would pass none on in the next step, and what is not
        computed yet would be fused into it, with other last bits than after a resume.
        """
        jt.sync([*self.parameters.values(), *self.means.values(), *self.squares.values()])
        for parameter in self.parameters.values():
            parameter.detach_inplace()
            parameter.start_grad()
        jt.sync_all()

    def _update(self, name: str, parameter: jt.Var, gradient: jt.Var, factors: jt.Var) -> None:
        (slow, fast), mean, square = self.betas, self.means[name], self.squares[name]
        shrink, rate, root = factors[0], factors[1], factors[2]
        with jt.no_grad():
            mean.update(mean + (gradient - mean) * (1 - slow))
            square.update(square * fast + gradient * gradient * (1 - fast))
            # Compiled with -Ofast, the root of a denormal number is NaN; this one is 1e-7 of eps.
            scale = jt.sqrt(jt.maximum(square, SMALLEST)) / root + self.eps
            parameter.update(parameter * shrink - mean / scale * rate)

    def state(self) -> dict[str, Any]:
        """`step`, and the moments by the parameters' names, copied."""
        return {
            "step": self.count,
            "exp_avg": {name: np.array(value.numpy()) for name, value in self.means.items()},
            "exp_avg_sq": {name: np.array(value.numpy()) for name, value in self.squares.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was asked for, of the same parameters."""
        shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            require_same_parameters(state[key], shapes)
        self.count = int(state["step"])
        for name in self.parameters:
            self.means[name].update(jt.array(state["exp_avg"][name]))
            self.squares[name].update(jt.array(state["exp_avg_sq"][name]))
        self._settle()


def _zeros_like(parameter: jt.Var) -> jt.Var:
    return jt.array(np.zeros(tuple(parameter.shape), np.float32)).stop_grad()
