"""The endless stream of training samples: which sample stands where, and what is drawn for it.

Everything follows from (seed, position in the stream), so neither the number of workers nor of
processes changes a sample, and a run continues anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from segmill.data.folder import FolderDataset
from segmill.data.sample import Sample
from segmill.data.transforms import TrainSample


class InMemory:
    """All samples decoded once, before workers are forked, which then share the arrays."""

    def __init__(self, samples: FolderDataset, *, threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            self._samples: Sequence[Sample] = list(
                pool.map(samples.__getitem__, range(len(samples)))
            )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """One decoded sample; its arrays are shared, so nobody writes into them."""
        return self._samples[index]


Samples = FolderDataset | InMemory


@runtime_checkable
class Transform(Protocol):
    """A training transform; every draw comes from `rng`, so that a position means one sample."""

    def __call__(self, sample: Sample, rng: np.random.RandomState) -> TrainSample: ...


class TrainStream:
    """Sample at a position of the stream: shuffled anew in every epoch, augmented.

    An epoch of more samples than there are (`epoch_length`) repeats the whole list as often as it
    fits and fills up with samples that are drawn anew in every epoch (DFormer's tiled epochs).
    """

    def __init__(
        self, samples: Samples, transform: Transform, *, seed: int, epoch_length: int | None = None
    ) -> None:
        self._samples, self._transform, self._seed = samples, transform, seed
        self._length = len(samples) if epoch_length is None else epoch_length
        self._rng = np.random.RandomState()  # seeded for every sample; making one takes longer

    def __getitem__(self, position: int) -> TrainSample:
        """Decode and transform; the draws belong to the position, not to the worker."""
        sample = self._samples[self.index(position)]
        self._rng.seed([self._seed, 0, position])
        return self._transform(sample, self._rng)

    def index(self, position: int) -> int:
        """Which sample stands at a position of the stream."""
        count = len(self._samples)
        place = shuffled(position, self._length, self._seed)
        if place < self._length - self._length % count:
            return place % count
        return int(_remainder(count, self._seed, position // self._length)[place % count])


class StepBatches:
    """Positions of every micro-batch of one process, without end.

    Step s covers positions [s x batch, (s + 1) x batch). Each process takes its contiguous share
    and cuts it into `accumulate` micro-batches.
    """

    def __init__(
        self,
        *,
        batch: int,
        accumulate: int,
        start_step: int,
        place: Callable[[], tuple[int, int]],
    ) -> None:
        self._batch, self._accumulate, self._start = batch, accumulate, start_step
        self._place = place

    def __iter__(self) -> Iterator[list[int]]:
        """Asks for (rank, world size) only now: the processes meet after the loaders are made."""
        rank, world = self._place()
        size = self._batch // (world * self._accumulate)
        position = self._start * self._batch + rank * size * self._accumulate
        while True:
            for micro in range(self._accumulate):
                first = position + micro * size
                yield list(range(first, first + size))
            position += self._batch


class Shard:
    """Indices of one process in evaluation: rank, rank + world, ...; none padded, none twice."""

    def __init__(self, length: int, place: Callable[[], tuple[int, int]]) -> None:
        self._length, self._place = length, place

    def __len__(self) -> int:
        """Number of samples of this process."""
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        """In the order of the data set."""
        return iter(self._indices())

    def _indices(self) -> range:
        rank, world = self._place()
        return range(rank, self._length, world)


def shuffled(position: int, length: int, seed: int) -> int:
    """Index of the sample at `position` of the stream over `length` samples."""
    epoch, offset = divmod(position, length)
    return int(_permutation(length, seed, epoch)[offset])


# Two epochs meet inside one global batch.
@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> Int[np.ndarray, " N"]:
    return np.random.RandomState([seed, 1, epoch]).permutation(length)


@lru_cache(maxsize=4)
def _remainder(length: int, seed: int, epoch: int) -> Int[np.ndarray, " N"]:
    return np.random.RandomState([seed, 2, epoch]).permutation(length)
