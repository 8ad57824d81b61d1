"""What several corruptions share: scaling to [0, 1] and back, Gaussian blur, zoom, line blur.

Rounding is part of the published corruptions: they end by cutting off to 8 bits, so a flat area may
turn one level darker when a sum is taken in another order or precision. Whatever is faster here
than the original therefore keeps its precision and, where values meet whole levels, its order.
"""

import math

import numpy as np
from jaxtyping import Float, Float64, UInt8
from scipy.ndimage import gaussian_filter

_ROWS = 32  # rows worked on at a time, so that a block of a picture stays in the processor's cache


def unit(image: UInt8[np.ndarray, "H W 3"]) -> Float64[np.ndarray, "H W 3"]:
    """0..255 -> [0, 1] in float64."""
    return image / 255.0


def picture(values: Float[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """[0, 1] -> 0..255, cut off, not rounded. Overwrites `values`; their precision is kept."""
    np.clip(values, 0, 1, out=values)
    values *= 255
    return values.astype(np.uint8)


def smooth(values: Float[np.ndarray, "H W *C"], sigma: float) -> Float[np.ndarray, "H W *C"]:
    """Gaussian blur over rows and columns, cut at 4 sigma; the border repeats."""
    sigmas = (sigma, sigma, 0)[: values.ndim]
    return gaussian_filter(values, sigma=sigmas, mode="nearest", truncate=4.0)


def zoom(values: Float[np.ndarray, "H W C"], factor: float) -> Float[np.ndarray, "h w C"]:
    """Enlarge the central 1/factor of a picture to its size or up to `factor` pixels more.

    Bilinear with the corners on the corners; equals `scipy.ndimage.zoom(crop, order=1)`, and so
    computes in float64 and rounds once to the precision of `values`.
    """
    height, width, channels = values.shape
    crop_height, crop_width = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    rows = _between(crop_height, round(crop_height * factor))
    columns = _between(crop_width, round(crop_width * factor))
    crop = values[top : top + crop_height, left : left + crop_width]
    out = np.empty((len(rows[0]), len(columns[0]), channels), values.dtype)
    for start in range(0, len(out), _ROWS):
        low, high, low_weight, high_weight = (each[start : start + _ROWS] for each in rows)
        first, last = low[0], high[-1] + 1
        wide = _mix(crop[first:last].astype(np.float64), 1, *columns)
        block = _mix(wide, 0, low - first, high - first, low_weight, high_weight)
        out[start : start + _ROWS] = block
    return out


def smear(
    values: Float64[np.ndarray, "H W C"], *, radius: int, sigma: float, angle: float
) -> Float64[np.ndarray, "H W C"]:
    """Blur along a line, to one side only: a trail whose weights fall like half a Gaussian.

    `angle` in degrees. The trail ends early where it is longer than the picture.
    """
    height, width, channels = values.shape
    weights, shifts = _trail(radius, sigma, angle, (height, width))
    reach = 2 * radius + 1
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    padded = padded.reshape(height + 2 * reach, -1)
    out = np.zeros((height, width * channels))
    scaled = np.empty((_ROWS, width * channels))
    for top in range(0, height, _ROWS):
        block = out[top : top + _ROWS]
        part = scaled[: len(block)]
        for weight, (down, right) in zip(weights, shifts, strict=False):
            row, column = reach + top - down, (reach - right) * channels
            source = padded[row : row + len(block), column : column + block.shape[1]]
            np.multiply(source, weight, out=part)
            block += part
    return out.reshape(height, width, channels)


def _between(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each new position: the two old neighbours and their weights."""
    at = np.arange(new_size) * ((size - 1) / (new_size - 1))
    low = np.minimum(at.astype(np.int64), size - 1)
    part = at - low
    # Rounding may push the last position past the last pixel, where SciPy reads 0.
    inside = at <= size - 1
    return low, np.minimum(low + 1, size - 1), (1 - part) * inside, part * inside


def _mix(
    values: Float64[np.ndarray, "H W C"],
    axis: int,
    low: np.ndarray,
    high: np.ndarray,
    low_weight: np.ndarray,
    high_weight: np.ndarray,
) -> Float64[np.ndarray, "h w C"]:
    along = (-1, 1, 1) if axis == 0 else (-1, 1)
    mixed = np.take(values, low, axis=axis)
    mixed *= low_weight.reshape(along)
    other = np.take(values, high, axis=axis)
    other *= high_weight.reshape(along)
    mixed += other
    return mixed


def _trail(
    radius: int, sigma: float, angle: float, size: tuple[int, int]
) -> tuple[list[float], list[tuple[int, int]]]:
    """Weights, and for as many of them as fit into the picture the shift (down, right)."""
    count = 2 * radius + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    weights /= weights.sum()
    down, right = count * math.sin(math.radians(angle)), count * math.cos(math.radians(angle))
    length = math.hypot(down, right)
    shifts = []
    for step in range(count):
        shift = (
            -math.ceil(step * down / length - 0.5),
            -math.ceil(step * right / length - 0.5),
        )
        if abs(shift[0]) >= size[0] or abs(shift[1]) >= size[1]:
            break
        shifts.append(shift)
    return weights.tolist(), shifts
