"""CUDA graphs: a network's forward pass as one launch, its backward pass as another.

Small batches wait for the processor, which takes longer to launch the kernels of a pass than the
GPU takes to run them. A recorded pass is launched at once, whatever is in it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch.autograd.function import once_differentiable

from segmill.models.combined import CombinedModel
from segmill.ops.accumulate import accumulate
from segmill.tta.norm_layers import has_batchnorm

log = logging.getLogger(__name__)

NOT_RECORDED = "trainer.cuda_graphs has no effect on the passes of %s: %s."
WARM_UPS = 3  # calls before a pass is recorded: what is compiled and chosen by trying is so by then
RECORDINGS = 3  # shapes of a network at most: each holds the memory of a pass


def replay_passes(model: CombinedModel) -> None:
    """From now on passes of both networks are recorded and replayed, whole weights provided.

    Not those of a network with BatchNorm, whose layers methods exchange; that is said.
    """
    guide = model.generative
    for network in (model.discriminative.network, None if guide is None else guide.network):
        if network is not None and has_batchnorm(network):
            log.warning(NOT_RECORDED, type(network).__name__, "it has BatchNorm")
        elif network is not None:
            network.forward = Replayed(network)


@runtime_checkable
class Pass(Protocol):
    """A pass for inputs of one shape."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, which the next call overwrites."""
        ...

    def backward(self, upstream: Tensor) -> None:
        """Add to the parameters' gradients those of the last output."""
        ...


class RecordedPass:
    """The kernels of `call`, a network's forward, with memory of their own for what they exchange.

    Weights are read where they lie: they may change in place, and not move. Under autocast those of
    linear layers and convolutions are read in its type, from copies made when they have changed,
    not in every pass.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        learnt: Sequence[nn.Parameter],
    ) -> None:
        kind = _autocast_type(inputs[0].device)
        self._inputs, self._learnt = [each.clone() for each in inputs], learnt
        # Leaves of their own: those of the network may belong to passes that are still alive.
        self._leaves = _leaves(network, learnt, kind)
        self._copies = Copies(self._leaves, learnt)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Loaders go on in other threads; what autocast keeps would be found by later passes.
        held = {"pool": torch.cuda.graph_pool_handle(), "capture_error_mode": "thread_local"}
        lasting = torch.autocast(
            inputs[0].device.type, kind, enabled=kind is not None, cache_enabled=False
        )
        with _exchanged(network, dict(zip(learnt, self._leaves, strict=True))), lasting:
            self._warm_up(call)
            with torch.cuda.graph(self._forward, **held):
                self._output = call(*self._inputs)
            self._upstream = torch.zeros_like(self._output)
            with torch.cuda.graph(self._backward, **held):
                self._gradients = self._differentiated(self._output, self._upstream)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        self._copies.refresh()
        _foreach_copy_(self._inputs, list(inputs))
        self._forward.replay()
        return self._output.detach()

    def backward(self, upstream: Tensor) -> None:
        self._upstream.copy_(upstream)
        self._backward.replay()
        alike: tuple[list[Tensor], list[Tensor]] = ([], [])
        for weight, gradient in zip(self._learnt, self._gradients, strict=True):
            if gradient is None:
                continue
            held = weight.grad
            if held is None:
                weight.grad = torch.empty_like(weight).copy_(gradient)
            elif held.dtype == gradient.dtype and held.stride() == gradient.stride():
                alike[0].append(held)
                alike[1].append(gradient)
            else:
                accumulate(held, gradient)
        if alike[0]:
            _foreach_add_(*alike)

    def _warm_up(self, call: Callable[..., Tensor]) -> None:
        """On a stream of its own, as the recording will be: libraries prepare for each anew."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                output = call(*self._inputs)
                self._differentiated(output, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(side)

    def _differentiated(self, output: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, self._leaves, upstream, allow_unused=True)


def _autocast_type(device: torch.device) -> torch.dtype | None:
    """None: there is no autocast."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


class Copies:
    """Those of `copies` that are of another type than their originals, and so no views of them."""

    def __init__(self, copies: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
        pairs = zip(copies, originals, strict=True)
        self._pairs = [(copy, original) for copy, original in pairs if copy.dtype != original.dtype]
        self._versions: list[int] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Make them anew if an original has changed: autograd counts the changes in place."""
        versions = [original._version for _, original in self._pairs]
        if versions != self._versions:
            for copy, original in self._pairs:
                copy.copy_(original)
            self._versions = versions


def _leaves(
    network: nn.Module, learnt: Sequence[nn.Parameter], kind: torch.dtype | None
) -> list[nn.Parameter]:
    """Each weight as a leaf on the same memory; where autocast would convert it, as a copy."""
    converted = {
        id(layer.weight)
        for layer in network.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and kind is not None
    }
    return [
        nn.Parameter(each.detach().to(kind) if id(each) in converted else each.detach())
        for each in learnt
    ]


@contextmanager
def _exchanged(network: nn.Module, leaves: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """The network with other parameters, for as long as it lasts."""
    places = [
        (layer._parameters, name, each)
        for layer in network.modules()
        for name, each in layer._parameters.items()
        if each is not None and each in leaves
    ]
    for parameters, name, each in places:
        parameters[name] = leaves[each]
    try:
        yield
    finally:
        for parameters, name, each in places:
            parameters[name] = each


class Replayed:
    """Takes the place of `network.forward`: as it, but recorded where that is possible.

    That is on a GPU, with gradients, of tensors that need none themselves, once a shape has come
    several times; of the first shapes only, until other weights are learnt. While an earlier output
    may still be differentiated, a call is not a replay: its pass would be overwritten. Gradients
    are added to the parameters' `grad` by the backward pass itself; hooks of the parameters are not
    called. Inputs that cannot be recorded are reported.
    """

    def __init__(self, network: nn.Module, record: Callable[..., Pass] | None = None) -> None:
        self._network = network
        self._call: Callable[..., Tensor] = network.forward
        self._parameters = list(network.parameters())
        self._record = record
        self._weights: tuple[int, ...] = ()
        self._passes: dict[Any, Pass] = {}
        self._seen: Counter[Any] = Counter()
        self._pending: weakref.ref[_Turn] | None = None
        self._said = False

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        learnt = [each for each in self._parameters if each.requires_grad]
        if not learnt or not torch.is_grad_enabled() or not self._fits(inputs, options):
            return self._call(*inputs, **options)
        weights = tuple(each.data_ptr() for each in learnt)
        if weights != self._weights:
            self._weights = weights
            self._passes.clear()
            self._seen.clear()
        key = _key(inputs)
        found = self._passes.get(key)
        if found is None:
            self._seen[key] += 1
            if self._seen[key] <= WARM_UPS or len(self._passes) == RECORDINGS:
                return self._call(*inputs)
            found = (self._record or RecordedPass)(self._network, self._call, inputs, learnt)
            self._passes[key] = found
        turn = _Turn()
        self._pending = weakref.ref(turn)
        return _Replay.apply(found, turn, learnt[0], *inputs)

    def _fits(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> bool:
        tensors = all(isinstance(each, Tensor) and not each.requires_grad for each in inputs)
        if options or not tensors:
            if not self._said:
                why = "it is called with more than tensors that need no gradients"
                log.warning(NOT_RECORDED, type(self._network).__name__, why)
            self._said = True
            return False
        on_gpu = self._record is not None or all(each.is_cuda for each in inputs)
        return on_gpu and (self._pending is None or self._pending() is None)


def _key(inputs: Sequence[Tensor]) -> Any:
    shapes = tuple((each.shape, each.dtype) for each in inputs)
    return shapes, _autocast_type(inputs[0].device)


class _Turn:
    """Lives as long as an output's graph: until it was differentiated or forgotten."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: Pass, turn: _Turn, _anchor: Tensor, *inputs: Tensor) -> Tensor:
        """`_anchor` is a parameter: for its sake autograd asks for gradients."""
        ctx.recorded, ctx.turn, ctx.count = recorded, turn, len(inputs)
        return recorded.forward(inputs).clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[None, ...]:
        ctx.recorded.backward(gradients[0])
        ctx.turn = None
        return (None,) * (3 + ctx.count)
