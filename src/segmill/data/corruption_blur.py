"""Corruptions by blur: defocus, glass, motion, zoom, gaussian.

Formulas: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, https://arxiv.org/abs/1903.12261; for pictures of any size: Michaelis et al.,
"Benchmarking Robustness in Object Detection", 2019, https://arxiv.org/abs/1907.07484
(imagecorruptions). Severity 1..5 picks a row of each table.
"""

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8

from segmill.data.corruption_steps import picture, smear, smooth, unit, zoom

_DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, sigma of the disk's edge
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # sigma, reach, rounds
_MOTION = ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0))  # radius, sigma
_ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))  # stop, step
_GAUSSIAN_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)


def defocus_blur(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Spread each point over a disk: a lens out of focus."""
    radius, edge_sigma = _DEFOCUS[severity - 1]
    return picture(cv2.filter2D(unit(image), -1, _disk(radius, edge_sigma)))


def glass_blur(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Frosted glass: pixels copied from their neighbourhood, between two light blurs."""
    sigma, reach, rounds = _GLASS[severity - 1]
    values = smooth(unit(image), sigma)
    values *= 255
    pixels = values.astype(np.uint8)
    for _ in range(rounds):
        pixels = _copy_from_neighbours(pixels, reach, rng)
    return picture(smooth(unit(pixels), sigma))


def motion_blur(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """A camera moved to the side, up to 45 degrees up or down."""
    radius, sigma = _MOTION[severity - 1]
    angle = rng.uniform(-45, 45)
    moved = smear(image.astype(np.float64), radius=radius, sigma=sigma, angle=angle)
    return np.clip(moved, 0, 255, out=moved).astype(np.uint8)


def zoom_blur(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """A camera moved forwards: the mean of the picture and its enlargements."""
    # Rounding decides how many there are: 12 at severity 1, which includes its stop, 1.11.
    factors = np.arange(1, *_ZOOM[severity - 1])
    values = unit(image).astype(np.float32)
    height, width = values.shape[:2]
    total = np.zeros_like(values)
    for factor in factors.tolist():
        total += values if factor == 1 else zoom(values, factor)[:height, :width]
    return picture((values + total) / (len(factors) + 1))


def gaussian_blur(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Gaussian blur."""
    return picture(smooth(unit(image), _GAUSSIAN_SIGMA[severity - 1]))


def _disk(radius: int, edge_sigma: float) -> Float32[np.ndarray, "N N"]:
    """A disk of sum 1 with a smoothed edge, on at least 17 x 17 pixels."""
    axis = np.arange(-max(8, radius), max(8, radius) + 1)
    disk = (axis**2 + axis[:, None] ** 2 <= radius**2).astype(np.float32)
    disk /= disk.sum()
    side = 3 if radius <= 8 else 5
    return np.asarray(cv2.GaussianBlur(disk, (side, side), sigmaX=edge_sigma))


def _copy_from_neighbours(
    pixels: UInt8[np.ndarray, "H W 3"], reach: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Visit the pixels from the lower right to the upper left; each takes the value of a neighbour.

    The original does so one by one (it looks like a swap there, but the neighbour keeps its value),
    so that a neighbour visited before already shows what it has taken itself. Every pixel is
    written once, hence those chains of copies are followed to their ends all at once, with twice
    the step each time.
    """
    height, width = pixels.shape[:2]
    place = np.arange(height * width, dtype=np.int32).reshape(height, width)
    visited = place[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    count = visited.size
    offset = rng.randint(-reach, reach, size=(count, 2)).astype(np.int32)  # column, row
    here = visited[::-1, ::-1].reshape(count)
    source = place.reshape(-1).copy()
    source[here] += offset[:, 1] * width + offset[:, 0]
    return pixels.reshape(-1, 3)[_ends(source, here)].reshape(pixels.shape)


def _ends(source: Int[np.ndarray, " N"], visited: Int[np.ndarray, " M"]) -> Int[np.ndarray, " N"]:
    """For each pixel the one whose old value it ends up with."""
    is_visited = np.zeros(len(source), bool)
    is_visited[visited] = True
    place = np.arange(len(source), dtype=source.dtype)
    # A source further down the page was written before; its own source is the next link.
    link = np.where((source > place) & is_visited[source], source, place)
    while True:
        further = link[link]
        if np.array_equal(further, link):
            return source[link]
        link = further
