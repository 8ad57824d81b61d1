"""Sums, rows and means over processes, the same on each of them, whichever images it sees.

Gradients are averaged over the processes. So each process gives its own share of the mean, times
their number; where all see the same image that is the mean itself.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, distributed

from segmill.tta.sharding import world_size


def over_processes(own: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sum of all processes' tensors, without gradient."""
    total = own.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def rows_of_processes(own: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "N ..."]:
    """The rows of all processes, in the order of the processes; each may have another number."""
    if world_size() == 1:
        return own
    count = torch.tensor(len(own), device=own.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    distributed.all_gather(counts, count)
    lengths = [int(each) for each in counts]
    padded = own.new_zeros((max(lengths), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def selected_mean(
    values: Float[Tensor, "B h w"], chosen: Bool[Tensor, "B h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over the chosen values of all processes, and their number; of none it is 0."""
    own = (values * chosen).sum()
    total, count = over_processes(torch.stack([own.detach(), chosen.sum()])).unbind()
    enough = count.clamp(min=1)
    share = own * (world_size() / enough)
    return share + (total / enough - share.detach()), count
