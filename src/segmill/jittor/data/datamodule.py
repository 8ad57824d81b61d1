"""SegmentationData: any FolderDataset as numpy batches, the same as Lightning's loaders give."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from segmill.data.splits import Splits, Views, stacked
from segmill.data.stream import TrainStream
from segmill.data.transforms import TrainSample

AHEAD = 2  # batches that the threads prepare beyond the present one


class SegmentationData(Splits):
    """Batches of one process; the keywords are those of `Splits`. `workers` are threads."""

    def train_batches(self) -> Iterator[dict[str, Any]]:
        """Endless: image (B, C, H, W), label (B, H, W), valid (B, 4), jitter (B, J), name."""
        self.require_shares(1)
        positions = iter(self.batches(lambda: (0, 1)))
        if not self.workers:
            stream = self.stream()
            for batch in positions:
                yield stacked([stream[position] for position in batch])
        self.samples(self.train_split)  # decode before the threads start
        yield from self._prepared(positions)

    def eval_items(self, split: str) -> Iterator[dict[str, Any]]:
        """Single images under the protocol, in the order of the data set."""
        views = Views(self.samples(split), self.protocol)
        for index in range(len(views)):
            yield views[index]

    def _prepared(self, positions: Iterator[Sequence[int]]) -> Iterator[dict[str, Any]]:
        # A stream seeds one generator for every sample, so each thread has its own.
        own = threading.local()

        def sample(position: int) -> TrainSample:
            if not hasattr(own, "stream"):
                own.stream = self.stream()
            stream: TrainStream = own.stream
            return stream[position]

        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[list[Future[TrainSample]]] = deque()
            for batch in positions:
                waiting.append([pool.submit(sample, position) for position in batch])
                if len(waiting) > AHEAD:
                    yield stacked([each.result() for each in waiting.popleft()])
