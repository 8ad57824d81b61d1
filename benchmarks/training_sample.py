"""Benchmark 1: one training sample on one thread, from file bytes to a uint8 crop.

JPEG 683 x 512 and PNG label -> scale U(0.5, 2), crop 512 x 512, flip, photometric draws. Peers run
in the same process, interleaved, on the same bytes and seeds: MMSegmentation's order of transforms
in OpenCV, and torchvision.transforms.v2. Normalisation is on the device for all of them. Ours
leaves the photometric distortion to the device as well; its cost there is not in the table.
Times are CPU times of the thread, so that other work on the machine disturbs them less.

    python benchmarks/training_sample.py [--repeats 200]
"""

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from segmill.data import decode, transforms
from segmill.data.labels import LabelMap
from segmill.data.sample import Sample

HEIGHT, WIDTH, CROP, RATIO = 512, 683, (512, 512), (0.5, 2.0)
Make = Callable[[int], tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor]]


def photo_like(rng: np.random.RandomState) -> tuple[bytes, bytes]:
    """A JPEG and a PNG label of 16 classes in blobs, with the file sizes of ADE20K's average."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((4, 60), (16, 40), (64, 20), (256, 6)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32) * strength
        image += cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + 128, 0, 255).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    blobs = cv2.resize(rng.standard_normal((6, 8)).astype(np.float32), (WIDTH, HEIGHT))
    label = np.clip(blobs * 40 + 75, 0, 150).astype(np.uint8) // 10 * 10
    png = io.BytesIO()
    Image.fromarray(label).save(png, "png")
    return jpeg.tobytes(), png.getvalue()


def ours(jpeg: bytes, png: bytes) -> Make:
    """What a worker of segmill does."""
    to_class = LabelMap({0: "ignore", "1-150": "0-149"}, num_classes=150)
    transform = transforms.TrainTransform(
        scale=(2048, 512),
        ratio=RATIO,
        short_edges=None,
        crop=CROP,
        cat_max_ratio=0.75,
        flip=0.5,
        photometric=True,
    )
    rng = np.random.RandomState()

    def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
        image = decode.decode_image(jpeg, "x.jpg")
        label = to_class(decode.decode_label(png, "x.png", "index"), "x.png")
        rng.seed([0, 0, seed])
        sample = transform(Sample(image, label, "x"), rng)
        return channels_first(sample.image), sample.label

    return make


def mmsegmentation_order(jpeg: bytes, png: bytes) -> Make:
    """Labels by Pillow, everything resized, then cropped, distorted on the CPU and packed."""

    rng = np.random.RandomState()

    def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng.seed([0, 0, seed])
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        label = np.array(Image.open(io.BytesIO(png)))
        label[label == 0] = 255
        label = label - 1
        label[label == 254] = 255
        image, label = transforms.random_resize(image, label, (2048, 512), RATIO, rng)
        top, left = transforms.crop_origin(label.shape, CROP, rng)
        for _ in range(10):
            part = label[top : top + CROP[0], left : left + CROP[1]]
            values, counts = np.unique(part, return_counts=True)
            counts = counts[values != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
            top, left = transforms.crop_origin(label.shape, CROP, rng)
        window = np.s_[top : top + CROP[0], left : left + CROP[1]]
        image, label = transforms.random_flip(image[window], label[window], 0.5, rng)
        image = transforms.apply_jitter(image, transforms.draw_jitter(rng))
        image, label = transforms.pad(image, CROP), transforms.pad(label, CROP)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), label.astype(np.int64)

    return make


def torchvision_v2(jpeg: bytes, png: bytes) -> Make:
    """torchvision's own decoder and transforms, on uint8 tensors."""
    image_bytes, label_bytes = (
        torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in (jpeg, png)
    )
    fill: dict[Any, Any] = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
    transform = v2.Compose(
        [
            v2.ScaleJitter((HEIGHT, WIDTH), RATIO, antialias=False),
            v2.RandomCrop(CROP, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomPhotometricDistort(p=0.5),
        ]
    )

    def make(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        image = tv_tensors.Image(decode_image(image_bytes, ImageReadMode.RGB))
        label = decode_image(label_bytes, ImageReadMode.UNCHANGED)
        label = torch.where(label == 0, 255, label - 1)
        return transform(image, tv_tensors.Mask(label))

    return make


def channels_first(image: np.ndarray) -> np.ndarray:
    """As the collate of segmill does it."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, [planes[0], planes[1], planes[2]])
    return planes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats: int = parser.parse_args().repeats
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = photo_like(np.random.RandomState(0))
    makes: dict[str, Make] = {
        "ours": ours(*files),
        "MMSegmentation's order": mmsegmentation_order(*files),
        "torchvision v2": torchvision_v2(*files),
    }
    image, label = makes["ours"](0)
    reference = makes["MMSegmentation's order"](0)
    assert np.array_equal(label, reference[1])  # parity of what is compared, before it is timed
    assert image.shape == reference[0].shape
    seconds: dict[str, list[float]] = {name: [] for name in makes}
    for seed in range(repeats + 5):
        for name, make in makes.items():
            started = time.thread_time()
            make(seed)
            if seed >= 5:
                seconds[name].append(time.thread_time() - started)
    console = Console()
    table = Table(
        title=f"One training sample ({len(files[0]) // 1000} kB JPEG), CPU ms, one thread"
    )
    for column in ("", "median", "10 %", "90 %", "peer / ours", "target"):
        table.add_column(column, justify="right")
    targets = {"MMSegmentation's order": ">= 2.5", "torchvision v2": ">= 1.4"}
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [10, 50, 90]) * 1e3
        ratio = median / (np.median(seconds["ours"]) * 1e3)
        cells = [f"{value:.2f}" for value in (median, low, high, ratio)]
        table.add_row(name, *cells, targets.get(name, ""))
    console.print(table)


if __name__ == "__main__":
    main()
