"""Corruptions by weather: snow, frost, fog, spatter.

Formulas: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, https://arxiv.org/abs/1903.12261; for pictures of any size: Michaelis et al.,
"Benchmarking Robustness in Object Detection", 2019, https://arxiv.org/abs/1907.07484
(imagecorruptions). Severity 1..5 picks a row of each table.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from segmill.data.corruption_steps import picture, smear, smooth, unit, zoom

_SNOW = (  # mean, scale, zoom, threshold, radius, sigma of the trail, share of the picture
    (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
)
_FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # picture, texture
_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))  # strength, decay of the plasma
_WATER = (  # mean, scale, sigma, threshold, intensity
    (0.65, 0.3, 4.0, 0.69, 0.6),
    (0.65, 0.3, 3.0, 0.68, 0.6),
    (0.65, 0.3, 2.0, 0.68, 0.5),
)
_MUD = ((0.65, 0.3, 1.0, 0.65, 1.5), (0.67, 0.4, 1.0, 0.65, 1.5))  # severities 4 and 5, the same
_WATER_COLOUR, _MUD_COLOUR = (175, 238, 238), (63, 42, 20)


def snow(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Falling flakes, drawn out by their movement, over a paler picture."""
    mean, scale, factor, threshold, radius, sigma, share = _SNOW[severity - 1]
    height, width = image.shape[:2]
    flakes = zoom(rng.normal(mean, scale, size=(height, width, 1)), factor)
    flakes[flakes < threshold] = 0
    np.clip(flakes, 0, 1, out=flakes)
    angle = rng.uniform(-135, -45)
    # The trail comes before the crop to the picture: it starts outside.
    flakes = smear(flakes, radius=radius, sigma=sigma, angle=angle)[:height, :width]
    flakes = np.round(flakes * 255).astype(np.uint8) / 255
    values = image.astype(np.float32)
    values /= 255
    pale = cv2.cvtColor(values, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 0.5
    values = share * values + (1 - share) * np.maximum(values, pale)
    return picture(values + (flakes + np.rot90(flakes, 2)))


def frost(
    image: UInt8[np.ndarray, "H W 3"],
    severity: int,
    rng: np.random.RandomState,
    textures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Add a random crop of one of five textures (see `frost_textures`)."""
    kept, added = _FROST[severity - 1]
    height, width = image.shape[:2]
    texture = textures[rng.randint(5)]
    own_height, own_width = texture.shape[:2]
    scale = 1.1 * max(1, height / own_height, width / own_width)
    size = (math.ceil(own_width * scale), math.ceil(own_height * scale))
    texture = cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC)
    top = rng.randint(0, texture.shape[0] - height)
    left = rng.randint(0, texture.shape[1] - width)
    values = image * kept
    values += added * texture[top : top + height, left : left + width]
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def fog(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Add a cloud (plasma fractal), then scale so that the brightest value stays."""
    strength, decay = _FOG[severity - 1]
    height, width = image.shape[:2]
    values = unit(image)
    largest = values.max()
    cloud = _plasma(rng, 1 << (max(height, width) - 1).bit_length(), decay)[:height, :width]
    values += (strength * cloud)[..., None]
    values *= largest
    values /= largest + strength
    return picture(values)


def spatter(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Drops on the lens: water at severities 1 to 3, mud at 4 and 5."""
    mean, scale, sigma, threshold, intensity = (*_WATER, *_MUD)[severity - 1]
    liquid = smooth(rng.normal(mean, scale, size=image.shape[:2]), sigma)
    liquid[liquid < threshold] = 0
    values = image.astype(np.float32)
    values /= 255
    if severity <= len(_WATER):
        amount = (_water(liquid) * intensity)[..., None]
        return picture(values + amount * (np.asarray(_WATER_COLOUR) / 255).astype(np.float32))
    amount = smooth((liquid > threshold).astype(np.float32), intensity)
    amount[amount < 0.8] = 0
    amount = amount[..., None]
    # The last sum in float64, the products with the picture in float32: as published.
    return picture(values * (1 - amount) + amount * (np.asarray(_MUD_COLOUR) / 255))


def _plasma(rng: np.random.RandomState, size: int, decay: float) -> Float32[np.ndarray, "N N"]:
    """A periodic fractal of the diamond-square kind in [0, 1]; `size` is a power of two."""
    plasma = np.zeros((size, size), np.float32)
    step, wobble = size, 100.0

    def moved(four: Float32[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
        """The mean of four neighbours, given as their sum, and a random height."""
        return four / 4 + wobble * rng.uniform(-wobble, wobble, four.shape)

    while step >= 2:
        half = step // 2
        corner = plasma[::step, ::step]
        four = corner + np.roll(corner, -1, axis=0)
        four += np.roll(four, -1, axis=1)
        centre = plasma[half::step, half::step]
        centre[:] = moved(four)
        above = centre + np.roll(centre, 1, axis=0)
        plasma[::step, half::step] = moved(above + (corner + np.roll(corner, -1, axis=1)))
        left = centre + np.roll(centre, 1, axis=1)
        plasma[half::step, ::step] = moved(left + (corner + np.roll(corner, -1, axis=0)))
        step, wobble = half, wobble / decay
    plasma -= plasma.min()
    plasma /= plasma.max()
    return plasma


def _water(liquid: Float64[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    """How much each pixel shines, 0..1: thick drops, and their embossed edges."""
    thickness = (liquid * 255).astype(np.uint8)
    edges = cv2.Canny(thickness, 50, 150)
    distance = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), 20)
    relief = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    emboss = np.asarray(((-2, -1, 0), (-1, 1, 1), (0, 1, 2)))
    relief = cv2.blur(cv2.filter2D(relief, cv2.CV_8U, emboss), (3, 3))
    shine = thickness * relief.astype(np.float32)
    # A small picture may stay dry; the original divides by 0 there.
    return shine / max(shine.max(), 1)
