"""SegmentationData: any FolderDataset as Lightning loaders of uint8 batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from segmill.data.files import DataError
from segmill.data.loader import forked_loader, place_of_process
from segmill.data.splits import Splits, Views, stacked
from segmill.data.stream import Shard
from segmill.data.transforms import TrainSample


class SegmentationData(Splits, lightning.LightningDataModule):
    """Loaders of one data set; the keywords are those of `Splits`.

    `workers` are forked per process. Lightning must not add its own DistributedSampler.
    """

    def train_dataloader(self) -> DataLoader:
        """Endless batches: image (B, C, H, W), label (B, H, W), valid (B, 4), jitter, name."""
        self.require_shares(place_of_process()[1])
        return self._loader(
            self.stream(), train_batch, batch_sampler=self.batches(place_of_process)
        )

    def val_dataloader(self) -> DataLoader:
        """`eval_loader` of the validation split."""
        return self.eval_loader(self.val_split)

    def test_dataloader(self) -> DataLoader:
        """`eval_loader` of the test split."""
        if self.test_split is None:
            raise DataError(f"data={self.name} has no test split (data.test_split is null).")
        return self.eval_loader(self.test_split)

    def eval_loader(self, split: str) -> DataLoader:
        """Single images under the protocol: inputs, label at the original size, name, size."""
        samples = self.samples(split)
        return self._loader(
            Views(samples, self.protocol),
            as_tensors,
            sampler=Shard(len(samples), place_of_process),
            batch_size=None,
        )

    def _loader(self, dataset: Any, collate: Callable, **order: Any) -> DataLoader:
        return forked_loader(dataset, collate, workers=self.workers, **order)


def train_batch(samples: Sequence[TrainSample]) -> dict[str, Any]:
    """One contiguous uint8 batch, channels first."""
    return as_tensors(stacked(samples))


def as_tensors(item: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors for arrays, which share their memory."""
    return {key: _tensors(value) for key, value in item.items()}


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list):
        return [_tensors(each) for each in value]
    return value
