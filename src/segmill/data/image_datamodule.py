"""ImageData: images with one label each as Lightning loaders, batched like SegmentationData."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import lightning
import numpy as np
from jaxtyping import Float32, Int64, UInt8
from torch.utils.data import DataLoader

from segmill.data.classes import counted_classes
from segmill.data.datamodule import SegmentationData, as_tensors
from segmill.data.files import DataError
from segmill.data.labelled_image import LabelledImages, LabelMaps
from segmill.data.loader import forked_loader, place_of_process
from segmill.data.splits import channels_first, require_shares
from segmill.data.stream import Shard, StepBatches, shuffled
from segmill.data.transforms import NO_JITTER, draw_jitter
from segmill.protocol import Protocol


class ImageData(lightning.LightningDataModule):
    """One data set, from the keys of its YAML; `images` opens a split of it by name.

    All images are `crop` large. Training ones are shifted by up to `shift` pixels in each direction
    (the border is repeated), mirrored with probability `flip`, and with `photometric` distorted in
    colour as MMSegmentation does. `batch_size` is global.
    """

    depth_range = None

    def __init__(
        self,
        *,
        name: str,
        images: Callable[..., LabelledImages],
        classes: str | Path,
        num_classes: int,
        channels: Literal[3],
        channel_order: Literal["rgb", "bgr"],
        train_split: str,
        val_split: str,
        test_split: str | None,
        crop: tuple[int, int],
        shift: int,
        flip: float,
        photometric: bool,
        test_scale: tuple[int, int] | None,
        batch_size: int,
        workers: int,
        protocol: Protocol,
        seed: int,
        accumulate: int,
        start_step: int,
    ) -> None:
        super().__init__()
        if shift < 0 or not 0 <= flip <= 1:
            raise DataError(
                f"data.shift={shift}, data.flip={flip}: shift is 0 pixels or more, flip a share "
                "between 0 and 1."
            )
        self.name, self.classes = name, counted_classes(classes, num_classes)
        self.channels, self.channel_order = channels, channel_order
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.crop, self.test_scale = crop, test_scale
        self.shift, self.flip, self.photometric = shift, flip, photometric
        self.batch_size, self.workers = batch_size, workers
        self.protocol, self.seed = protocol, seed
        self.accumulate, self.start_step = accumulate, start_step
        self._open, self._opened = images, dict[str, LabelledImages]()

    def images(self, split: str) -> LabelledImages:
        """The images of a split."""
        if split not in self._opened:
            self._opened[split] = self._open(split=split)
        return self._opened[split]

    def dataset(self, split: str) -> LabelMaps:
        """The same as samples of segmentation, for pictures of them."""
        return LabelMaps(self.images(split))

    def require_shares(self, world: int) -> None:
        """Refuse a global batch that `world` processes cannot share evenly."""
        require_shares(self.batch_size, world, self.accumulate)

    def train_dataloader(self) -> DataLoader:
        """Endless batches: image (B, 3, h, w), label (B, 1, 1), valid (B, 4), jitter, name."""
        self.require_shares(place_of_process()[1])
        batches = StepBatches(
            batch=self.batch_size,
            accumulate=self.accumulate,
            start_step=self.start_step,
            place=place_of_process,
        )
        stream = _Stream(self.images(self.train_split), self)
        return forked_loader(stream, train_batch, workers=self.workers, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """`eval_loader` of the validation split."""
        return self.eval_loader(self.val_split)

    def test_dataloader(self) -> DataLoader:
        """`eval_loader` of the test split."""
        if self.test_split is None:
            raise DataError(f"data={self.name} has no test split (data.test_split is null).")
        return self.eval_loader(self.test_split)

    def eval_loader(self, split: str) -> DataLoader:
        """Single images: inputs, label (1, 1, 1), name, size (1, 1)."""
        images = self.images(split)
        return forked_loader(
            _Views(images),
            as_tensors,
            workers=self.workers,
            sampler=Shard(len(images), place_of_process),
            batch_size=None,
        )


TrainingData = SegmentationData | ImageData


@dataclass(frozen=True)
class TrainImage:
    """One augmented image as it travels to the device, which applies `jitter`."""

    image: UInt8[np.ndarray, "h w 3"]
    label: Int64[np.ndarray, "1 1"]
    valid: tuple[int, int, int, int]
    jitter: Float32[np.ndarray, " J"]
    name: str


class _Stream:
    """The training images without end; the draws belong to the position in the stream."""

    def __init__(self, images: LabelledImages, data: ImageData) -> None:
        self._images, self._data = images, data
        self._rng = np.random.RandomState()  # seeded for every image; making one takes longer

    def __getitem__(self, position: int) -> TrainImage:
        data = self._data
        found = self._images[shuffled(position, len(self._images), data.seed)]
        if found.image.shape[:2] != data.crop:
            height, width = found.image.shape[:2]
            raise DataError(
                f"{found.name} of data={data.name} is {height} x {width}, data.crop is "
                f"{data.crop[0]} x {data.crop[1]}. Set data.crop=[{height},{width}]."
            )
        self._rng.seed([data.seed, 0, position])
        image = shifted(found.image, data.shift, self._rng)
        if self._rng.rand() < data.flip:
            image = cv2.flip(image, 1)
        jitter = draw_jitter(self._rng) if data.photometric else NO_JITTER
        box = (0, 0, *data.crop)
        label = np.array([[found.label]])
        return TrainImage(np.ascontiguousarray(image), label, box, jitter, found.name)


class _Views:
    """What evaluation sees of an image."""

    def __init__(self, images: LabelledImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self._images[index]
        return {
            "inputs": [channels_first(found.image)],
            "label": np.array([[[found.label]]]),
            "name": found.name,
            "size": (1, 1),
            "index": index,
        }


def shifted(
    image: UInt8[np.ndarray, "H W 3"], most: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Moved by up to `most` pixels down and to the right, or up and to the left."""
    top, left = rng.randint(0, 2 * most + 1, size=2).tolist()
    height, width = image.shape[:2]
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
    return padded[top : top + height, left : left + width]


def train_batch(images: Sequence[TrainImage]) -> dict[str, Any]:
    """One contiguous uint8 batch, channels first; a label is a map of one pixel."""
    batch = {
        "image": np.concatenate([channels_first(each.image) for each in images]),
        "label": np.stack([each.label for each in images]),
        "valid": np.array([each.valid for each in images]),
        "jitter": np.stack([each.jitter for each in images]),
        "name": [each.name for each in images],
    }
    return as_tensors(batch)
