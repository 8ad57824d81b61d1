"""Digital corruptions: brightness, saturate, contrast, elastic transform, pixelate, JPEG.

Formulas: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, https://arxiv.org/abs/1903.12261; for pictures of any size: Michaelis et al.,
"Benchmarking Robustness in Object Detection", 2019, https://arxiv.org/abs/1907.07484
(imagecorruptions). Severity 1..5 picks a row of each table.
"""

import io

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

from segmill.data.corruption_steps import picture, unit

_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
_SATURATE = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))  # factor, summand
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
_ELASTIC = (250 * 0.05, 250 * 0.065, 250 * 0.085, 250 * 0.1, 250 * 0.12)
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
_JPEG_QUALITY = (25, 18, 15, 10, 7)


def brightness(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Raise the value of HSV."""
    hue, saturation, value = _rgb_to_hsv(unit(image))
    value += _BRIGHTNESS[severity - 1]
    return picture(_hsv_to_rgb(hue, saturation, np.clip(value, 0, 1, out=value)))


def saturate(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Scale the saturation of HSV: paler at severities 1 and 2, stronger from 3 on."""
    factor, summand = _SATURATE[severity - 1]
    hue, saturation, value = _rgb_to_hsv(unit(image))
    saturation *= factor
    saturation += summand
    return picture(_hsv_to_rgb(hue, np.clip(saturation, 0, 1, out=saturation), value))


def contrast(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw each channel towards its mean over the picture."""
    values = unit(image)
    mean = values.mean(axis=(0, 1), keepdims=True)
    values -= mean
    values *= _CONTRAST[severity - 1]
    values += mean
    return picture(values)


def elastic_transform(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Move the pixels by a smooth random field; labels stay where they are."""
    height, width = image.shape[:2]
    right = _field(rng, height, width, _ELASTIC[severity - 1])
    down = _field(rng, height, width, _ELASTIC[severity - 1])
    values = image.astype(np.float32)
    values /= 255
    return picture(_sample(values, np.arange(height)[:, None] + down, np.arange(width) + right))


def pixelate(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Average over boxes, then repeat the means."""
    height, width = image.shape[:2]
    share = _PIXELATE[severity - 1]
    small = Image.fromarray(image).resize(
        (int(width * share), int(height * share)), Image.Resampling.BOX
    )
    return np.array(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(
    image: UInt8[np.ndarray, "H W 3"], severity: int, _rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Save as a JPEG of low quality and read it again."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY[severity - 1])
    return np.array(Image.open(file))


def _rgb_to_hsv(
    values: Float64[np.ndarray, "H W 3"],
) -> tuple[Float64[np.ndarray, "H W"], Float64[np.ndarray, "H W"], Float64[np.ndarray, "H W"]]:
    """Hue, saturation and value in [0, 1], with scikit-image's operations in their order."""
    red, green, blue = (np.ascontiguousarray(values[..., channel]) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    # Grey has no hue and no saturation: any divisor gives 0 there (black has value 0 besides).
    divisor = np.where(spread == 0, 1.0, spread)
    sixth = np.where(
        blue == value,
        4.0 + (red - green) / divisor,
        np.where(green == value, 2.0 + (blue - red) / divisor, (green - blue) / divisor),
    )
    hue = np.where(spread == 0, 0.0, sixth / 6.0 % 1.0)
    return hue, spread / np.where(value == 0, 1.0, value), value


def _hsv_to_rgb(
    hue: Float64[np.ndarray, "H W"],
    saturation: Float64[np.ndarray, "H W"],
    value: Float64[np.ndarray, "H W"],
) -> Float64[np.ndarray, "H W 3"]:
    sector = np.floor(hue * 6)
    part = hue * 6 - sector
    low = value * (1 - saturation)
    falling = value * (1 - part * saturation)
    rising = value * (1 - (1 - part) * saturation)
    sector = sector.astype(np.uint8) % 6
    out = np.empty((*hue.shape, 3))
    out[..., 0] = np.choose(sector, (value, falling, low, low, rising, value))
    out[..., 1] = np.choose(sector, (rising, value, value, falling, low, low))
    out[..., 2] = np.choose(sector, (low, low, rising, value, value, falling))
    return out


def _field(
    rng: np.random.RandomState, height: int, width: int, alpha: float
) -> Float32[np.ndarray, "H W"]:
    """Displacements in pixels along one axis."""
    largest = 0.005 * height  # for both axes, as published
    draws = rng.uniform(-largest, largest, size=(height, width))
    sigmas = (0.01 * height, 0.01 * width)
    field = gaussian_filter(draws, sigma=sigmas, mode="reflect", truncate=3)
    field *= alpha
    return field.astype(np.float32)


def _sample(
    values: Float32[np.ndarray, "H W 3"],
    row: Float64[np.ndarray, "H W"],
    column: Float64[np.ndarray, "H W"],
) -> Float32[np.ndarray, "H W 3"]:
    """Bilinear, mirrored at the border; equals `scipy.ndimage.map_coordinates(order=1)`.

    So computed in float64 and rounded once, to float32.
    """
    height, width, channels = values.shape
    pixels = values.reshape(-1, channels)
    top, left = np.floor(row), np.floor(column)
    below, beside = (row - top)[..., None], (column - left)[..., None]
    top, left = top.astype(np.int64), left.astype(np.int64)
    rows = [_mirrored(top + step, height) * width for step in (0, 1)]
    columns = [_mirrored(left + step, width) for step in (0, 1)]
    total = pixels[rows[0] + columns[0]] * ((1 - below) * (1 - beside))
    total += pixels[rows[0] + columns[1]] * ((1 - below) * beside)
    total += pixels[rows[1] + columns[0]] * (below * (1 - beside))
    total += pixels[rows[1] + columns[1]] * (below * beside)
    return total.astype(np.float32)


def _mirrored(index: Int[np.ndarray, "H W"], size: int) -> Int[np.ndarray, "H W"]:
    """Where an index outside of 0..size-1 falls: c b a | a b c | c b a."""
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)
