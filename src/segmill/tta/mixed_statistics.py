"""BatchNorm by stored statistics that move a share of the way to those of the input."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

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
        self._own: dict[nn.Module, tuple[Tensor | None, Tensor | None, torch.dtype]] = {}

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
        handles: list[RemovableHandle] = []
        for layer in self._stored:
            handles.append(layer.register_forward_pre_hook(self._exchange))
            # First, so that hooks around these find what they left.
            handles.append(
                layer.register_forward_hook(self._put_back, prepend=True, always_call=True)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _exchange(
        self, layer: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "..."]]:
        """Let the layer itself normalise: timm's have their activation in the same forward."""
        assert isinstance(layer, _BatchNorm)
        values = inputs[0].float()
        mean, var = self._mixture(layer, values)
        self._own[layer] = layer.running_mean, layer.running_var, inputs[0].dtype
        if not mean.requires_grad:
            layer.running_mean, layer.running_var = mean, var
            return (values,)
        # Torch lets no gradient through stored statistics: normalised here, and by 0 and 1 there.
        along = (-1, *[1] * (values.ndim - 2))
        layer.running_mean = torch.zeros_like(mean)
        layer.running_var = torch.full_like(var, 1 - layer.eps)
        return ((values - mean.view(along)) / (var.view(along) + layer.eps).sqrt(),)

    def _put_back(
        self,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],  # noqa: ARG002
        output: Tensor | None,
    ) -> Tensor | None:
        """The layer's own statistics, also after an error; the output in the input's type."""
        assert isinstance(layer, _BatchNorm)
        if layer not in self._own:
            return output
        layer.running_mean, layer.running_var, dtype = self._own.pop(layer)
        return None if output is None else output.to(dtype)

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
