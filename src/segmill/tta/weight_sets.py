"""Further values for a network's weights: a teacher's, the source's, those of before a step.

A copy of the network would need hooks and shards of its own; values that are exchanged in place
need neither. Of sharded weights a set has this process's shards only. The next forward sees new
values because `sharding.shard` gives the gathered weights back after every forward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from segmill.tta.sharding import local

Parameters = Mapping[str, nn.Parameter]


class WeightSet:
    """One value for each of `parameters`, on their device; at first the present one."""

    def __init__(self, parameters: Parameters) -> None:
        self._values = {name: each.clone() for name, each in in_place(parameters).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    @torch.no_grad()
    def put_into(self, parameters: Parameters) -> None:
        """Overwrite the parameters, bit for bit."""
        _foreach_copy_(list(in_place(parameters).values()), self._ordered(parameters))
        # Autocast would go on with the copies of the weights that were there.
        torch.clear_autocast_cache()

    @contextmanager
    def installed(self, parameters: Parameters) -> Iterator[None]:
        """The parameters have these values for as long as the block runs; for use without grad."""
        own = WeightSet(parameters)
        self.put_into(parameters)
        try:
            yield
        finally:
            own.put_into(parameters)

    @torch.no_grad()
    def follow(self, parameters: Parameters, *, momentum: float) -> None:
        """Exponential moving average: keep `momentum` of each value, take the rest from outside."""
        present = list(in_place(parameters).values())
        _foreach_lerp_(self._ordered(parameters), present, 1 - momentum)

    def _ordered(self, parameters: Parameters) -> list[Tensor]:
        return [self._values[name] for name in parameters]


def in_place(parameters: Parameters) -> dict[str, Tensor]:
    """This process's part of each parameter, without gradient; what is written there counts."""
    return {name: local(each.detach()) for name, each in parameters.items()}


def shard_like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a tensor that every process has whole, cut as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def return_some(
    parameters: Parameters, source: WeightSet, *, share: float, generator: torch.Generator
) -> None:
    """Let each weight return to the source's with the probability `share`."""
    for (name, parameter), own in zip(
        parameters.items(), in_place(parameters).values(), strict=True
    ):
        # The whole weight's numbers, of which a shard takes its own.
        drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
        chosen = shard_like(drawn < share, parameter)
        own.copy_(torch.where(chosen, source[name], own))
