"""ClassSplit: the classes of a window are shared out over the processes, and their sum comes back.

All processes hold the same image, noise, times and class sets. What each one lacks of the sum is a
constant to it, so its gradients are those of its own classes; averaged over the processes, as
sharding does, and with the loss multiplied by their number, they are those of a single process.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor, distributed


@dataclass(frozen=True)
class ClassSplit:
    """This process's place among those that work on the same image."""

    rank: int
    size: int

    @classmethod
    def of_processes(cls) -> "ClassSplit":
        """The default process group; without one, all classes are this process's own."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls(0, 1)

    def share(self, values: Tensor) -> Tensor:
        """This process's part of (N, M, ...): every `size`-th class, so that counts are equal."""
        assert values.shape[1] % self.size == 0, "class sets are padded to the number of processes"
        return values[:, self.rank :: self.size]

    def total(self, part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over the processes, of which only this process's own part has a gradient."""
        if self.size == 1:
            return part
        total = part.detach().clone()
        distributed.all_reduce(total)
        return part + (total - part.detach())

    def of_first(self, values: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """The first process's values, on every process."""
        if self.size == 1:
            return values
        values = values.contiguous()
        distributed.broadcast(values, src=0)
        return values
