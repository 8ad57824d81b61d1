"""What a method learns through: the optimizer of a TTAModule, at once or after several batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn

from segmill.tta.sharding import average_gradients


class DirectUpdater:
    """Every step is taken when the method asks for it, through Lightning's precision and strategy.

    `averaged` are parameters whose gradients are to be averaged over the processes here, after each
    backward pass; of sharded ones torch does so.
    """

    def __init__(self, module: LightningModule, averaged: Sequence[nn.Parameter]) -> None:
        self._module, self._averaged = module, averaged

    def backward(self, loss: Float[Tensor, ""]) -> None:
        held = [parameter.grad for parameter in self._averaged]
        for parameter in self._averaged:
            parameter.grad = None
        self._module.manual_backward(loss)
        average_gradients(self._averaged)
        for parameter, before in zip(self._averaged, held, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before + parameter.grad

    def step(self) -> None:
        self._optimizer.step()
        self.zero_grad()
        # Autocast would go on with the weights' copies from before the step.
        torch.clear_autocast_cache()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def forget(self) -> None:
        self._optimizer.optimizer.state.clear()

    @property
    def _optimizer(self) -> Any:
        return self._module.optimizers()


class GatheringUpdater:
    """For methods that accumulate: gradients of several batches, and processes, make one step.

    `finish` takes the step, if the method has asked for one since the last. `averaged` as above,
    but once a step.
    """

    def __init__(self, module: LightningModule, averaged: Sequence[nn.Parameter]) -> None:
        self._direct, self._averaged = DirectUpdater(module, []), averaged
        self._asked = False

    def backward(self, loss: Float[Tensor, ""]) -> None:
        self._direct.backward(loss)

    def step(self) -> None:
        self._asked = True

    def zero_grad(self) -> None:
        raise AssertionError("a method that accumulates never throws gradients away")

    def forget(self) -> None:
        raise AssertionError("a method that accumulates never starts its optimizer anew")

    def finish(self) -> None:
        """After the last batch of a step."""
        if self._asked:
            average_gradients(self._averaged)
            self._direct.step()
        self._asked = False
