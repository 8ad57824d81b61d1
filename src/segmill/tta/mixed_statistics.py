"""BatchNorm by stored statistics that move a share of the way to those of the input."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segmill.tta.selection import over_processes
from segmill.tta.sharding import world_size

Pair = tuple[Float[Tensor, " D"], Float[Tensor, " D"]]


class MixedStatistics:
    """Statistics of its own for every BatchNorm layer of `module`, at first the layers'.

    They are in use inside `used` and `mixed`, and the layers' own are never written. `share` is
    the weight of the input's statistics in `mixed`, `correction` what torch.var says by that name;
    with `gradient` the gradient goes through the input's. A layer whose input has one value a
    channel uses the stored ones. Without BatchNorm nothing changes.
    """

    def __init__(
        self, module: nn.Module, *, share: float, correction: Literal[0, 1], gradient: bool
    ) -> None:
        self.share, self.correction, self.gradient = share, correction, gradient
        self._stored: dict[nn.Module, Pair] = {
            each: (each.running_mean.clone(), each.running_var.clone())
            for each in module.modules()
            if isinstance(each, _BatchNorm)
            and each.running_mean is not None
            and each.running_var is not None
        }
        self._mode: Literal["used", "mixed", "kept"] = "used"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Normalise by the stored statistics."""
        with self._at_work("used"):
            yield

    @contextmanager
    def mixed(self, *, keep: bool) -> Iterator[None]:
        """Normalise by stored and input's statistics; with `keep` the mixture is stored."""
        with self._at_work("kept" if keep else "mixed"):
            yield
        if keep:
            self._agree()

    @contextmanager
    def _at_work(self, mode: Literal["used", "mixed", "kept"]) -> Iterator[None]:
        self._mode = mode
        handles = [each.register_forward_hook(self._normalised) for each in self._stored]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _normalised(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Float[Tensor, "..."]:
        """In the place of the layer's output, of the same type."""
        assert isinstance(layer, _BatchNorm)
        values = inputs[0].float()
        mean, var = self._mixture(layer, values)
        if not mean.requires_grad:
            normal = F.batch_norm(values, mean, var, layer.weight, layer.bias, eps=layer.eps)
            return normal.to(output.dtype)
        along = (-1, *[1] * (values.ndim - 2))
        normal = (values - mean.view(along)) / (var.view(along) + layer.eps).sqrt()
        if layer.affine:
            normal = normal * layer.weight.view(along) + layer.bias.view(along)
        return normal.to(output.dtype)

    def _mixture(self, layer: nn.Module, values: Float[Tensor, "..."]) -> Pair:
        stored = self._stored[layer]
        if self._mode == "used" or values.numel() == values.shape[1]:
            return stored
        axes = [axis for axis in range(values.ndim) if axis != 1]
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            var, mean = torch.var_mean(values, dim=axes, correction=self.correction)
            mixture = (
                (1 - self.share) * stored[0] + self.share * mean,
                (1 - self.share) * stored[1] + self.share * var,
            )
        if self._mode == "kept":
            self._stored[layer] = mixture[0].detach(), mixture[1].detach()
        return mixture

    def _agree(self) -> None:
        """Processes that saw other images go on with the mean of what each one stored."""
        parts = world_size()
        if parts > 1:
            for layer, (mean, var) in self._stored.items():
                self._stored[layer] = over_processes(mean) / parts, over_processes(var) / parts
