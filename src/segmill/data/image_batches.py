"""Which images of a task a step takes, and which of them a process; no framework."""

from collections.abc import Callable, Iterator

from segmill.data.files import DataError

Place = Callable[[], tuple[int, int]]  # (rank, processes)


class ImageBatches:
    """Positions 0..count-1 in batches of `batch_size` for each process, in order.

    `place` is asked only at the iteration: processes meet after the loaders are made. Each takes
    other images, `batch_size` of processes x `batch_size` in a row. Every process has equally many
    batches, or the others would wait for ever: a last step with too few images for all of them
    becomes part of the step before, and what is left is shared as evenly as possible.
    """

    def __init__(self, *, count: int, batch_size: int, place: Place) -> None:
        self._count, self._batch_size, self._place = count, batch_size, place

    def __len__(self) -> int:
        """Batches of this process, which are as many as every other's."""
        return len(self.steps(self._place()[1]))

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process."""
        rank, world = self._place()
        for step in self.steps(world):
            yield list(part_of(step, rank, world))

    def steps(self, world: int) -> list[range]:
        """The positions of each step, of all processes together."""
        if self._count < world:
            raise DataError(
                f"{self._count} image(s) for {world} processes that take different ones "
                "(trainer.share=images): some would have none. Raise limit, lower trainer.devices, "
                "or set trainer.share=classes."
            )
        whole = self._batch_size * world
        steps = [
            range(start, min(start + whole, self._count)) for start in range(0, self._count, whole)
        ]
        if len(steps) > 1 and len(steps[-1]) < world:
            steps[-2:] = [range(steps[-2].start, self._count)]
        return steps


def part_of(step: range, rank: int, world: int) -> range:
    """The positions of a step that one process takes, as many as the others or one more."""
    share, more = divmod(len(step), world)
    first = rank * share + min(rank, more)
    return step[first : first + share + (rank < more)]
