"""The published transforms of MMSegmentation, and `TrainTransform`, which computes them crop-first.

Arrays stay uint8 and channel-last. An array with two axes is a label: resized by nearest, padded
with 255. All draws come from a RandomState in MMSegmentation's order, so a seed means the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8

from segmill.data.files import DataError
from segmill.data.sample import IGNORE, Sample

Image = UInt8[np.ndarray, "_ _ *C"]

# Photometric parameters of one sample. `contrast_first` says on which side of the hue shift the
# contrast comes; hue is in OpenCV's steps of 2 degrees.
JITTER = ("brightness", "contrast_first", "contrast", "saturation", "hue")
NO_JITTER = np.array([0, 0, 1, 1, 0], np.float32)
FULL_TURN = 180

_MORE_DRAWS = 10
# A warped pixel costs as much as five resized ones (measured, OpenCV 5, one thread).
_WARP_COST = 5


@dataclass(frozen=True)
class TrainSample:
    """One cropped sample as it travels to the device.

    `valid` is what the image covers, (top, left, bottom, right); the rest is padding.
    """

    image: UInt8[np.ndarray, "h w C"]
    label: UInt8[np.ndarray, "h w"]
    valid: tuple[int, int, int, int]
    jitter: Float32[np.ndarray, " J"]
    name: str


class TrainTransform:
    """Random resize, random crop, flip, photometric draws, padding to the crop size.

    The size is `scale` times a factor from `ratio`, or (Mask2Former) one of `short_edges` whose
    long edge stays within that of `scale`.
    Draws and label equal `random_resize` -> `random_crop` -> `random_flip` exactly. So does the
    image unless the crop is a small part of it: then only the crop is interpolated, with float32
    instead of OpenCV's 11-bit weights, at most 1 level apart. Depth is interpolated like colour:
    so do the published RGB-D recipes (DFormer), and no geometry code asks for the modality.
    """

    def __init__(
        self,
        *,
        scale: tuple[int, int],
        ratio: tuple[float, float] | None,
        short_edges: Sequence[int] | None,
        crop: tuple[int, int],
        cat_max_ratio: float,
        flip: float,
        photometric: bool,
    ) -> None:
        if (ratio is None) == (short_edges is None):
            raise DataError(
                f"data.ratio={ratio} and data.short_edges={short_edges} are two ways to draw a "
                "size: set one and make the other null."
            )
        self.scale, self.ratio, self.short_edges, self.crop = scale, ratio, short_edges, crop
        self.cat_max_ratio, self.flip, self.photometric = cat_max_ratio, flip, photometric

    def __call__(self, sample: Sample, rng: np.random.RandomState) -> TrainSample:
        """Crop one labelled sample."""
        image, label = sample.image, sample.label
        assert label is not None
        height, width = image.shape[:2]
        size = keep_ratio_size(height, width, self._drawn_scale(height, width, rng))
        rows, columns = nearest_index(height, size[0]), nearest_index(width, size[1])
        valid = (min(self.crop[0], size[0]), min(self.crop[1], size[1]))

        def cut(top: int, left: int) -> UInt8[np.ndarray, "h w"]:
            return _gathered(label, rows[top : top + valid[0]], columns[left : left + valid[1]])

        origin, part = _varied_crop(size, self.crop, self.cat_max_ratio, rng, cut)
        image = _resized_crop(image, size, origin, valid)
        if draw_flip(self.flip, rng):
            image, part = cv2.flip(image, 1), cv2.flip(part, 1)
        jitter = draw_jitter(rng) if self.photometric else NO_JITTER
        box = (0, 0, *valid)
        return TrainSample(pad(image, self.crop), pad(part, self.crop), box, jitter, sample.name)

    def _drawn_scale(self, height: int, width: int, rng: np.random.RandomState) -> tuple[int, int]:
        if self.ratio is not None:
            return random_scale(self.scale, self.ratio, rng)
        assert self.short_edges is not None
        edge = random_short_edge(self.short_edges, rng)
        return shortest_edge_scale(height, width, edge, max(self.scale))


def random_resize(
    image: Image,
    label: UInt8[np.ndarray, "H W"],
    scale: Sequence[int],
    ratio: Sequence[float],
    rng: np.random.RandomState,
) -> tuple[Image, UInt8[np.ndarray, "h w"]]:
    """RandomResize: keep the aspect ratio, fit into `scale` times a factor from `ratio`."""
    drawn = random_scale(scale, ratio, rng)
    return resize_keep_ratio(image, drawn), resize_keep_ratio(label, drawn)


def random_crop(
    image: Image,
    label: UInt8[np.ndarray, "H W"],
    crop: Sequence[int],
    cat_max_ratio: float,
    rng: np.random.RandomState,
) -> tuple[Image, UInt8[np.ndarray, "h w"]]:
    """RandomCrop: up to ten more draws until no class covers more than `cat_max_ratio`."""
    height, width = crop

    def cut(top: int, left: int) -> UInt8[np.ndarray, "h w"]:
        return label[top : top + height, left : left + width]

    (top, left), part = _varied_crop(label.shape, crop, cat_max_ratio, rng, cut)
    return image[top : top + height, left : left + width], part


def random_flip(
    image: Image, label: UInt8[np.ndarray, "H W"], prob: float, rng: np.random.RandomState
) -> tuple[Image, UInt8[np.ndarray, "H W"]]:
    """RandomFlip, horizontal."""
    return (cv2.flip(image, 1), cv2.flip(label, 1)) if draw_flip(prob, rng) else (image, label)


def pad(array: Image, size: Sequence[int]) -> Image:
    """Extend to (height, width) at the right and bottom: images by 0, labels by 255."""
    height, width = array.shape[:2]
    if (height, width) == tuple(size):
        return np.ascontiguousarray(array)
    fill = IGNORE if array.ndim == 2 else 0
    padded = np.full((*size, *array.shape[2:]), fill, np.uint8)
    padded[:height, :width] = array
    return padded


def resize(array: Image, size: tuple[int, int]) -> Image:
    """Resize to (height, width): images bilinear with half-pixel centres, labels nearest."""
    method = cv2.INTER_NEAREST if array.ndim == 2 else cv2.INTER_LINEAR
    return cv2.resize(array, (size[1], size[0]), interpolation=method)


def resize_keep_ratio(image: Image, scale: Sequence[int]) -> Image:
    """Resize: the largest size of the same shape inside (long edge, short edge)."""
    height, width = image.shape[:2]
    return resize(image, keep_ratio_size(height, width, scale))


def resize_to_multiple(image: Image, divisor: int) -> Image:
    """ResizeToMultiple: round both edges up."""
    height, width = (-(-edge // divisor) * divisor for edge in image.shape[:2])
    return resize(image, (height, width))


def resize_shortest_edge(image: Image, size: int, max_size: int) -> Image:
    """ResizeShortestEdge: short edge to `size` unless the long one would pass `max_size`."""
    height, width = image.shape[:2]
    return resize_keep_ratio(image, shortest_edge_scale(height, width, size, max_size))


def shortest_edge_scale(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """The (width, height) that ResizeShortestEdge then fits the image into."""
    factor = size / min(height, width)
    if factor * max(height, width) > max_size:
        factor = max_size / max(height, width)
    return int(width * factor + 0.5), int(height * factor + 0.5)


def keep_ratio_size(height: int, width: int, scale: Sequence[int]) -> tuple[int, int]:
    """(height, width) that fits an image into `scale`, whose larger entry bounds the long edge."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def random_scale(
    scale: Sequence[int], ratio: Sequence[float], rng: np.random.RandomState
) -> tuple[int, int]:
    """`scale` times one factor drawn from `ratio`."""
    low, high = ratio
    factor = rng.random_sample() * (high - low) + low
    return int(scale[0] * factor), int(scale[1] * factor)


def random_short_edge(edges: Sequence[int], rng: np.random.RandomState) -> int:
    """RandomChoiceResize: one of `edges`, each as likely."""
    return edges[rng.choice(len(edges))]


def crop_origin(
    size: Sequence[int], crop: Sequence[int], rng: np.random.RandomState
) -> tuple[int, int]:
    """Top and left of a crop in an image of `size`."""
    top = rng.randint(0, max(size[0] - crop[0], 0) + 1)
    return top, rng.randint(0, max(size[1] - crop[1], 0) + 1)


def is_varied(label: UInt8[np.ndarray, "h w"], cat_max_ratio: float) -> bool:
    """Whether two or more classes occur and none covers more than `cat_max_ratio` of them."""
    if cat_max_ratio >= 1:
        return True
    # float32 counts are exact up to 2^24 pixels.
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()[:IGNORE]
    several = cv2.countNonZero(counts) > 1
    return several and float(counts.max()) / float(counts.sum()) < cat_max_ratio


def draw_flip(prob: float, rng: np.random.RandomState) -> bool:
    """Whether to flip; a draw of `choice`, as in the original, not of `random_sample() < prob`."""
    return rng.choice(2, p=(prob, 1 - prob)) == 0


def draw_jitter(rng: np.random.RandomState) -> Float32[np.ndarray, " J"]:
    """Parameters of PhotoMetricDistortion (brightness 32, contrast and saturation 0.5, hue 18)."""
    brightness, _, contrast, saturation, hue = NO_JITTER.tolist()
    if rng.randint(2):
        brightness = rng.uniform(-32, 32)
    contrast_first = rng.randint(2)
    if contrast_first and rng.randint(2):
        contrast = rng.uniform(0.5, 1.5)
    if rng.randint(2):
        saturation = rng.uniform(0.5, 1.5)
    if rng.randint(2):
        # A drawn 0 still rounds through 8-bit HSV, which the full turn keeps apart from no draw.
        hue = rng.randint(-18, 18) or FULL_TURN
    if not contrast_first and rng.randint(2):
        contrast = rng.uniform(0.5, 1.5)
    return np.array([brightness, contrast_first, contrast, saturation, hue], np.float32)


def apply_jitter(
    image: UInt8[np.ndarray, "H W 3"], jitter: Float32[np.ndarray, " J"]
) -> UInt8[np.ndarray, "H W 3"]:
    """PhotoMetricDistortion on an RGB image: the reference of `segmill.photometric`."""
    brightness, contrast_first, contrast, saturation, hue = jitter.tolist()
    image = _linear(image, 1.0, brightness)
    if contrast_first:
        image = _linear(image, contrast, 0.0)
    if saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _linear(hsv[..., 1], saturation, 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if hue != 0:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + int(hue)) % FULL_TURN
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else _linear(image, contrast, 0.0)


def nearest_index(length: int, resized: int) -> Int[np.ndarray, " N"]:
    """Source index of every pixel after a resize by nearest, in OpenCV's arithmetic."""
    step = 1.0 / (resized / length)
    return np.minimum(np.floor(np.arange(resized) * step).astype(np.intp), length - 1)


def _gathered(
    label: UInt8[np.ndarray, "H W"], rows: Int[np.ndarray, " h"], columns: Int[np.ndarray, " w"]
) -> UInt8[np.ndarray, "h w"]:
    """`label[rows][:, columns]`, as two gathers of whole rows, which are four times as fast."""
    first, last = rows[0], rows[-1]
    by_column = cv2.transpose(label[first : last + 1])[columns]
    return cv2.transpose(by_column)[rows - first]


def _linear(image: Image, factor: float, offset: float) -> Image:
    values = image.astype(np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


def _varied_crop(
    size: Sequence[int],
    crop: Sequence[int],
    cat_max_ratio: float,
    rng: np.random.RandomState,
    cut: Callable[[int, int], UInt8[np.ndarray, "h w"]],
) -> tuple[tuple[int, int], UInt8[np.ndarray, "h w"]]:
    """The first origin whose label is varied, and that label; the last draw is taken as it is."""
    origin = crop_origin(size, crop, rng)
    for _ in range(_MORE_DRAWS):
        part = cut(*origin)
        if is_varied(part, cat_max_ratio):
            return origin, part
        origin = crop_origin(size, crop, rng)
    return origin, cut(*origin)


def _resized_crop(
    image: UInt8[np.ndarray, "H W C"],
    size: tuple[int, int],
    origin: tuple[int, int],
    crop: tuple[int, int],
) -> UInt8[np.ndarray, "h w C"]:
    """The window `origin`, `crop` of `image` resized to `size`, by whichever way costs less."""
    (top, left), (height, width) = origin, crop
    scale_y, scale_x = size[0] / image.shape[0], size[1] / image.shape[1]
    bottom, right = top + height, left + width
    if bottom * right <= _WARP_COST * height * width:
        # What lies below and to the right of the crop is left out; the rest keeps its phase.
        needed = image[: math.ceil(bottom / scale_y) + 2, : math.ceil(right / scale_x) + 2]
        # OpenCV copies where the rounded size stays, although the phase within it would not.
        stays = [round(n * f) == n for n, f in zip(needed.shape, (scale_y, scale_x), strict=False)]
        if needed.shape == image.shape or all(stays):
            return resize(image, size)[top:bottom, left:right]
        resized = cv2.resize(needed, None, None, scale_x, scale_y, cv2.INTER_LINEAR)
        return resized[top:bottom, left:right]
    to_source = np.array(
        [
            [1 / scale_x, 0, (left + 0.5) / scale_x - 0.5],
            [0, 1 / scale_y, (top + 0.5) / scale_y - 0.5],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image, to_source, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
