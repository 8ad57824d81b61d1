"""Means over what a method has chosen, the same on every process, whichever images each one sees.

Gradients are averaged over the processes. So each process gives its own share of the mean, times
their number; where all see the same image that is the mean itself.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from segmill.tta.sharding import world_size


def over_processes(own: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sum of all processes' tensors, without gradient."""
    total = own.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def selected_mean(
    values: Float[Tensor, "B h w"], chosen: Bool[Tensor, "B h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over the chosen values of all processes, and their number; of none it is 0."""
    own = (values * chosen).sum()
    total, count = over_processes(torch.stack([own.detach(), chosen.sum()])).unbind()
    enough = count.clamp(min=1)
    share = own * (world_size() / enough)
    return share + (total / enough - share.detach()), count
