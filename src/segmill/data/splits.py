"""Splits: a data set's samples, its training stream and its order, for any runtime. No framework.

The keywords are the keys of a YAML in configs/data and four of the command. A runtime adds loaders:
`datamodule.SegmentationData` for Lightning, `segmill.jittor.data` for Jittor.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from segmill.data.classes import counted_classes
from segmill.data.decode import LabelFormat
from segmill.data.files import DataError
from segmill.data.folder import FolderDataset, depth_keys
from segmill.data.stream import InMemory, Samples, StepBatches, TrainStream, Transform
from segmill.data.transforms import TrainSample, TrainTransform
from segmill.protocol import Protocol

# What `transform` replaces: keys of MMSegmentation's pipeline.
PIPELINE = ("scale", "ratio", "short_edges", "cat_max_ratio", "flip", "photometric")


class Splits:
    """One data set, from the keys of its YAML.

    `batch_size` is global: all processes and accumulated micro-batches of one optimizer step.
    `transform` takes the place of MMSegmentation's pipeline, whose keys are then null.
    `tiled_epochs`: an epoch is batch_size x (samples // batch_size + 1) samples, the whole list and
    a remainder drawn anew (DFormer); else every sample comes once. `channel_order` is the order in
    which the data set's published recipes feed the network: models that follow them read it, images
    stay RGB here.
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
        scale: tuple[int, int] | None,
        ratio: tuple[float, float] | None,
        crop: tuple[int, int],
        cat_max_ratio: float | None,
        flip: float | None,
        photometric: bool | None,
        test_scale: tuple[int, int] | None,
        batch_size: int,
        workers: int,
        cache: Literal["none", "ram"],
        protocol: Protocol,
        seed: int,
        accumulate: int,
        start_step: int,
        # Last and with defaults, so that files of older runs still fit.
        short_edges: tuple[int, ...] | None = None,
        transform: Transform | None = None,
        tiled_epochs: bool = False,
        channel_order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        super().__init__()
        # A `generate` without `_partial_` has already run when this is called.
        if generate is not None:
            generate()
        self.name, self.classes = name, counted_classes(classes, num_classes)
        self._folder: dict[str, Any] = {"data_root": data_root, "splits": splits}
        self._folder |= {"label_map": label_map}
        self._folder |= {"image": image, "label": label, "label_format": label_format}
        self._folder |= depth_keys(depth, depth_range, channels)
        self.channels, self.depth_range = channels, self._folder["depth_range"]
        self.crop, self.test_scale, self.channel_order = crop, test_scale, channel_order
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.batch_size, self.workers, self.cache = batch_size, workers, cache
        self.protocol, self.seed, self.tiled_epochs = protocol, seed, tiled_epochs
        self.accumulate, self.start_step = accumulate, start_step
        keys = (scale, ratio, short_edges, cat_max_ratio, flip, photometric)
        self._transform = _transform(transform, crop, dict(zip(PIPELINE, keys, strict=True)))
        self._datasets: dict[str, FolderDataset] = {}
        self._decoded: dict[str, InMemory] = {}

    def dataset(self, split: str) -> FolderDataset:
        """The samples of a split at their original size; files are listed once."""
        if split not in self._datasets:
            self._datasets[split] = FolderDataset(split=split, classes=self.classes, **self._folder)
        return self._datasets[split]

    def stream(self) -> TrainStream:
        """The training samples without end, each cropped and augmented."""
        samples = self.samples(self.train_split)
        count = len(samples)
        length = self.batch_size * (count // self.batch_size + 1) if self.tiled_epochs else count
        return TrainStream(samples, self._transform, seed=self.seed, epoch_length=length)

    def batches(self, place: Callable[[], tuple[int, int]]) -> StepBatches:
        """Positions of the micro-batches of this process; `place` says (rank, processes)."""
        return StepBatches(
            batch=self.batch_size,
            accumulate=self.accumulate,
            start_step=self.start_step,
            place=place,
        )

    def require_shares(self, world: int) -> None:
        """Refuse a global batch that `world` processes cannot share evenly."""
        require_shares(self.batch_size, world, self.accumulate)

    def samples(self, split: str) -> Samples:
        """The labelled samples of a split, decoded once where `cache` says so."""
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


def require_shares(batch_size: int, world: int, accumulate: int) -> None:
    """Refuse a global batch that `world` processes cannot share evenly."""
    if batch_size % (world * accumulate):
        raise DataError(
            f"data.batch_size={batch_size} is global and cannot be shared by {world} process(es) x "
            f"{accumulate} accumulated micro-batch(es). Set it to a multiple of "
            f"{world * accumulate}."
        )


def _transform(given: Transform | None, crop: tuple[int, int], keys: dict[str, Any]) -> Transform:
    needed = [key for key in keys if key not in ("ratio", "short_edges")]
    if given is None:
        if missing := [key for key in needed if keys[key] is None]:
            raise DataError(
                f"data.{missing[0]} is null. Set it, or name a whole transform in data.transform."
            )
        return TrainTransform(crop=crop, **keys)
    if useless := [key for key in keys if keys[key] is not None]:
        raise DataError(
            f"data.transform brings its own augmentation, so data.{useless[0]}="
            f"{keys[useless[0]]} would have no effect. Set it to null."
        )
    return given


def stacked(samples: Sequence[TrainSample]) -> dict[str, Any]:
    """One contiguous uint8 batch, channels first: image (B, C, H, W), label (B, H, W),
    valid (B, 4) as top, left, bottom, right, jitter (B, J), name."""
    height, width, channels = samples[0].image.shape
    image = np.empty((len(samples), channels, height, width), np.uint8)
    for planes, sample in zip(image, samples, strict=True):
        cv2.split(sample.image, list(planes))
    return {
        "image": image,
        "label": np.stack([sample.label for sample in samples]),
        "valid": np.array([sample.valid for sample in samples]),
        "jitter": np.stack([sample.jitter for sample in samples]),
        "name": [sample.name for sample in samples],
    }


def channels_first(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "1 C H W"]:
    """An image as a batch of one."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None])


class Views:
    """What evaluation sees of a sample: inputs of all scales, label at the original size."""

    def __init__(self, samples: Samples, protocol: Protocol) -> None:
        self._samples, self._protocol = samples, protocol

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """inputs (each (1, C, h, w) uint8), label (1, H, W), name, size."""
        sample = self._samples[index]
        assert sample.label is not None
        return {
            "inputs": [channels_first(view) for view in self._protocol.inputs(sample.image)],
            "label": sample.label[None].copy(),
            "name": sample.name,
            "size": sample.label.shape,
            "index": index,
        }
