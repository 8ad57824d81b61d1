"""Which images of a task make an optimizer step, and which of them are this process's."""

from dataclasses import dataclass

from torch.utils.data import DataLoader

from segmill.data.image_batches import ImageBatches, part_of
from segmill.errors import SegmillError


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Batches of images in their order, by position in the task's stream.

    `batches` are those of all processes together; each takes its part of every one. `accumulate`
    batches make a step; the last of a task has the rest.
    """

    batches: tuple[range, ...]
    accumulate: int
    rank: int
    processes: int  # that share the images

    def own(self, index: int) -> range:
        """This process's images of a batch."""
        return part_of(self.batches[index], self.rank, self.processes)

    def positions_of(self, rank: int) -> list[int]:
        """All images of a process, in the order in which it sees them."""
        parts = (part_of(batch, rank, self.processes) for batch in self.batches)
        return [position for part in parts for position in part]

    def ends_step(self, index: int) -> bool:
        """Whether the optimizer steps after this batch."""
        return (index + 1) % self.accumulate == 0 or index + 1 == len(self.batches)

    def factor(self, index: int) -> float:
        """Of the mean loss of this process's part of a batch, in the mean over its step's images.

        Gradients are averaged over the processes, so their number is in it.
        """
        first = index - index % self.accumulate
        of_step = sum(len(batch) for batch in self.batches[first : first + self.accumulate])
        return len(self.own(index)) * self.processes / of_step


def step_plan(loader: DataLoader, *, accumulate: int, rank: int, processes: int) -> StepPlan:
    """The plan of a task's loader: `ImageBatches`, or one image after the other."""
    batches = loader.batch_sampler
    if isinstance(batches, ImageBatches):
        found = batches.steps(processes)
    elif processes == 1:
        found = [range(index, index + 1) for index in range(len(loader))]
    else:
        raise SegmillError(
            "trainer.share=images is for data whose loader gives every process other images, as "
            "classification's do; this one's gives all processes the same. Set "
            "trainer.share=classes."
        )
    return StepPlan(batches=tuple(found), accumulate=accumulate, rank=rank, processes=processes)
