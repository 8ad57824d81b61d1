"""SegmentationData: any FolderDataset as Lightning loaders of uint8 batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import lightning
import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader

from segmill.data.classes import counted_classes
from segmill.data.decode import LabelFormat
from segmill.data.folder import DataError, FolderDataset, depth_keys
from segmill.data.loader import channels_first, forked_loader, unchanged
from segmill.data.sample import Sample
from segmill.data.stream import InMemory, Samples, Shard, StepBatches, TrainStream
from segmill.data.transforms import TrainSample, TrainTransform
from segmill.protocol import Protocol


class SegmentationData(lightning.LightningDataModule):
    """Loaders of one data set; the keywords are the keys of its YAML and four of the command.

    `batch_size` is global: all processes and accumulated micro-batches of one optimizer step.
    `workers` are forked per process. Lightning must not add its own DistributedSampler.
    """

    def __init__(
        self,
        *,
        name: str,
        data_root: str | Path,
        image: str,
        label: str | None,
        depth: str | None,
        depth_range: tuple[float, float] | None,
        splits: Mapping[str, Mapping[str, str]],
        label_map: Mapping[int | str, int | str],
        label_format: LabelFormat,
        classes: str | Path,
        num_classes: int,
        channels: Literal[3, 4],
        generate: Callable[[], None] | None,
        train_split: str,
        val_split: str,
        test_split: str | None,
        scale: tuple[int, int],
        ratio: tuple[float, float] | None,
        crop: tuple[int, int],
        cat_max_ratio: float,
        flip: float,
        photometric: bool,
        test_scale: tuple[int, int] | None,
        batch_size: int,
        workers: int,
        cache: Literal["none", "ram"],
        protocol: Protocol,
        seed: int,
        accumulate: int,
        start_step: int,
        short_edges: tuple[int, ...] | None = None,  # last, so that files of older runs still fit
    ) -> None:
        super().__init__()
        # A `generate` without `_partial_` has already run when this is called.
        if generate is not None:
            generate()
        self.name, self.classes = name, counted_classes(classes, num_classes)
        self._folder: dict[str, Any] = {
            "data_root": data_root,
            "splits": splits,
            "label_map": label_map,
        }
        self._folder |= {"image": image, "label": label, "label_format": label_format}
        self._folder |= depth_keys(depth, depth_range, channels)
        self.channels, self.depth_range = channels, self._folder["depth_range"]
        self.crop, self.test_scale = crop, test_scale
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.batch_size, self.workers, self.cache = batch_size, workers, cache
        self.protocol, self.seed = protocol, seed
        self.accumulate, self.start_step = accumulate, start_step
        draws = {"flip": flip, "photometric": photometric, "cat_max_ratio": cat_max_ratio}
        self._transform = TrainTransform(
            scale=scale, ratio=ratio, short_edges=short_edges, crop=crop, **draws
        )
        self._datasets: dict[str, FolderDataset] = {}
        self._decoded: dict[str, InMemory] = {}

    def dataset(self, split: str) -> FolderDataset:
        """The samples of a split at their original size; files are listed once."""
        if split not in self._datasets:
            self._datasets[split] = FolderDataset(split=split, classes=self.classes, **self._folder)
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader:
        """Endless batches: image (B, C, H, W), label (B, H, W), valid (B, 2), jitter, name."""
        self.require_shares(_place()[1])
        batches = StepBatches(
            batch=self.batch_size,
            accumulate=self.accumulate,
            start_step=self.start_step,
            place=_place,
        )
        stream = TrainStream(self._samples(self.train_split), self._transform, seed=self.seed)
        return self._loader(stream, train_batch, batch_sampler=batches)

    def require_shares(self, world: int) -> None:
        """Refuse a global batch that `world` processes cannot share evenly."""
        if self.batch_size % (world * self.accumulate):
            raise DataError(
                f"data.batch_size={self.batch_size} is global and cannot be shared by {world} "
                f"process(es) x {self.accumulate} accumulated micro-batch(es). Set it to a "
                f"multiple of {world * self.accumulate}."
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
        samples = self._samples(split)
        return self._loader(
            _Views(samples, self.protocol),
            unchanged,
            sampler=Shard(len(samples), _place),
            batch_size=None,
        )

    def _samples(self, split: str) -> Samples:
        dataset = self.dataset(split)
        if "label" not in dataset.patterns:
            raise DataError(
                f"data={self.name} has no labels (data.label is null), so it can neither train nor "
                "score a model. Give the pattern of the label files in data.label."
            )
        if self.cache == "none":
            return dataset
        if split not in self._decoded:
            self._decoded[split] = InMemory(dataset, threads=max(self.workers, 1))
        return self._decoded[split]

    def _loader(self, dataset: Any, collate: Callable, **order: Any) -> DataLoader:
        return forked_loader(dataset, collate, workers=self.workers, **order)


class _Views:
    """What evaluation sees of a sample."""

    def __init__(self, samples: Samples, protocol: Protocol) -> None:
        self._samples, self._protocol = samples, protocol

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return eval_item(self._samples[index], self._protocol)


def train_batch(samples: Sequence[TrainSample]) -> dict[str, Any]:
    """One contiguous uint8 batch, channels first."""
    height, width, channels = samples[0].image.shape
    image = np.empty((len(samples), channels, height, width), np.uint8)
    for planes, sample in zip(image, samples, strict=True):
        cv2.split(sample.image, list(planes))
    return {
        "image": torch.from_numpy(image),
        "label": torch.from_numpy(np.stack([sample.label for sample in samples])),
        "valid": torch.tensor([sample.valid for sample in samples]),
        "jitter": torch.from_numpy(np.stack([sample.jitter for sample in samples])),
        "name": [sample.name for sample in samples],
    }


def eval_item(sample: Sample, protocol: Protocol) -> dict[str, Any]:
    """Inputs of all scales of the protocol, and the label at the original size."""
    assert sample.label is not None
    return {
        "inputs": [channels_first(view) for view in protocol.inputs(sample.image)],
        "label": torch.from_numpy(sample.label[None].copy()),
        "name": sample.name,
        "size": sample.label.shape,
    }


def _place() -> tuple[int, int]:
    """(rank, world size) of this process at this moment."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
