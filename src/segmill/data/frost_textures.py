"""Textures of the frost corruption: the published photographs from a folder, or generated ones.

The photographs come with the code of Hendrycks & Dietterich 2019 (ImageNet-C,
https://github.com/hendrycks/robustness) and of imagecorruptions (Apache-2.0); they are no part of
this project. The generated ones have the same sizes, and the brightness and contrast of their
models, but other shapes: numbers measured with them differ from the published frost.
"""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64, UInt8
from scipy.ndimage import gaussian_filter

from segmill.data.files import DataError

# A sixth file, frost6.jpg, belongs to the set, but the published code never draws it.
FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
Textures = tuple[UInt8[np.ndarray, "_ _ 3"], ...]

_SPACING = 2.5  # pixels between two side branches
_MARGIN = 4  # pixels that are cut off, where the relief has no neighbour


def load_frost(frost_dir: str | os.PathLike[str] | None) -> Textures:
    """The photographs of `frost_dir`, or the generated textures; decoded once per process."""
    return generated_frost() if frost_dir is None else read_frost(Path(frost_dir))


@functools.lru_cache(maxsize=2)
def read_frost(frost_dir: Path) -> Textures:
    """The five photographs as RGB; the transparency of the PNGs is dropped, as published."""
    missing = [name for name in FILES if not (frost_dir / name).is_file()]
    if missing:
        raise DataError(
            f"The frost folder {frost_dir} lacks {', '.join(missing)}. It must hold "
            f"{', '.join(FILES)} of ImageNet-C (they come with imagecorruptions); or leave "
            "frost_dir empty (null) for generated textures, whose numbers differ from published "
            "ones."
        )
    return _frozen(_read(frost_dir / name) for name in FILES)


@functools.lru_cache(maxsize=1)
def generated_frost() -> Textures:
    """Five textures of feathery ice crystals, the same in every process."""
    return _frozen(_generate(each, seed) for seed, each in enumerate(_LOOKS))


@dataclass(frozen=True, kw_only=True)
class _Look:
    """How one generated texture looks; brightness and contrast are those of its photograph."""

    size: tuple[int, int]
    nuclei: int  # per 10,000 pixels
    arm: int  # mean length in pixels
    breadth: float  # of a feather, to each side, as a share of its length
    dark: tuple[int, int, int]
    light: tuple[int, int, int]
    mean: int
    contrast: int


@dataclass(frozen=True)
class _Twigs:
    """Slightly bent needles of ice; positions are (column, row) in pixels, angles in radians."""

    start: Float64[np.ndarray, "N 2"]
    heading: Float64[np.ndarray, " N"]
    bend: Float64[np.ndarray, " N"]
    length: Float64[np.ndarray, " N"]
    weight: Float64[np.ndarray, " N"]

    def point(
        self, twig: np.ndarray, at: Float64[np.ndarray, " M"]
    ) -> tuple[Float64[np.ndarray, "M 2"], Float64[np.ndarray, " M"]]:
        """Position and heading on each of the given twigs, `at` pixels from its start."""
        half = self.heading[twig] + 0.5 * self.bend[twig] * at
        position = self.start[twig] + at[:, None] * np.stack([np.cos(half), np.sin(half)], axis=1)
        return position, self.heading[twig] + self.bend[twig] * at


_LOOKS = (
    _Look(
        size=(600, 900),
        nuclei=5,
        arm=90,
        breadth=0.2,
        dark=(20, 110, 140),
        light=(190, 220, 225),
        mean=131,
        contrast=20,
    ),
    _Look(
        size=(315, 560),
        nuclei=10,
        arm=70,
        breadth=0.15,
        dark=(120, 122, 130),
        light=(235, 240, 250),
        mean=207,
        contrast=22,
    ),
    _Look(
        size=(315, 560),
        nuclei=6,
        arm=80,
        breadth=0.3,
        dark=(120, 122, 130),
        light=(235, 240, 250),
        mean=207,
        contrast=22,
    ),
    _Look(
        size=(350, 527),
        nuclei=14,
        arm=30,
        breadth=0.4,
        dark=(75, 88, 105),
        light=(230, 240, 250),
        mean=152,
        contrast=29,
    ),
    _Look(
        size=(495, 660),
        nuclei=6,
        arm=60,
        breadth=0.35,
        dark=(30, 42, 58),
        light=(235, 240, 250),
        mean=124,
        contrast=43,
    ),
)


def _frozen(textures: Iterable[UInt8[np.ndarray, "_ _ 3"]]) -> Textures:
    """Write-protected, since all callers share them."""
    kept = tuple(textures)
    for texture in kept:
        texture.setflags(write=False)
    return kept


def _read(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    texture = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if len(data) else None
    if texture is None:
        raise DataError(f"The frost texture {path} cannot be decoded. Copy it again.")
    return np.asarray(texture)


def _generate(look: _Look, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    rng = np.random.RandomState(seed)
    height, width = (side + 2 * _MARGIN for side in look.size)
    arms = _arms(rng, look.arm, look.nuclei, height, width)
    feathers = _sprout(rng, arms, share=look.breadth)
    barbs = _sprout(rng, feathers, share=0.35)
    ice = sum(_splat(twigs, height, width) for twigs in (arms, feathers, barbs))
    ice = gaussian_filter(1 - np.exp(-ice), 0.7)
    relief = ice - np.roll(ice, (2, 2), axis=(0, 1))  # lit from the upper left
    mist = gaussian_filter(ice, 8, truncate=3)
    grain = gaussian_filter(rng.normal(size=(height, width)), 0.7)
    value = ice + relief + 0.5 * mist + 0.15 * grain + 0.25 * _cloud(rng, height, width)
    value = value[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    value = (value - value.mean()) / value.std()
    return _tint(value, look)


def _arms(rng: np.random.RandomState, length: int, density: int, height: int, width: int) -> _Twigs:
    """Three to six arms around each nucleus; nuclei also lie outside, as far as arms reach in."""
    count = int(density * (height + 2 * length) * (width + 2 * length) / 10_000)
    nucleus = rng.uniform(-length, (width + length, height + length), size=(count, 2))
    star_length = length * rng.uniform(0.3, 1.7, size=count)
    star = np.repeat(np.arange(count), rng.randint(3, 7, size=count))
    return _Twigs(
        start=nucleus[star],
        heading=rng.uniform(0, 2 * np.pi, len(star)),
        bend=rng.normal(0, 0.004, len(star)),
        length=star_length[star] * rng.uniform(0.4, 1.0, len(star)),
        weight=rng.uniform(0.6, 1.4, len(star)),
    )


def _sprout(rng: np.random.RandomState, twigs: _Twigs, *, share: float) -> _Twigs:
    """Side branches at about 60 degrees, ice's angle, shorter towards the tip."""
    number = (twigs.length / _SPACING).astype(np.int64)
    parent = np.repeat(np.arange(len(number)), number)
    order = np.arange(len(parent)) - np.repeat(np.cumsum(number) - number, number)
    at = (order + rng.uniform(0, 0.7, len(parent))) * _SPACING
    start, heading = twigs.point(parent, at)
    side = np.where(order % 2 == 0, 1.0, -1.0)
    length = share * (twigs.length[parent] - at) * rng.uniform(0.5, 1.1, len(parent))
    return _Twigs(
        start=start,
        heading=heading + side * rng.normal(np.pi / 3.3, 0.06, len(parent)),
        bend=-side * 0.006,
        length=np.maximum(length, 1),
        weight=0.75 * twigs.weight[parent],
    )


def _splat(twigs: _Twigs, height: int, width: int) -> Float64[np.ndarray, "H W"]:
    """Sum of the twigs' weights per pixel, two samples a pixel of length, paler to the tip."""
    number = np.ceil(2 * twigs.length).astype(np.int64)
    twig = np.repeat(np.arange(len(number)), number)
    order = np.arange(len(twig)) - np.repeat(np.cumsum(number) - number, number)
    position, _ = twigs.point(twig, order / 2)
    weight = 0.5 * twigs.weight[twig] * (1 - 0.7 * order / number[twig])
    inside = ((position >= 0) & (position < (width - 1, height - 1))).all(axis=1)
    position, weight = position[inside], weight[inside]
    corner = position.astype(np.int64)
    part = position - corner
    total = np.zeros(height * width)
    for right in (0, 1):
        for down in (0, 1):
            near = np.where(right, part[:, 0], 1 - part[:, 0])
            near = near * np.where(down, part[:, 1], 1 - part[:, 1])
            place = (corner[:, 1] + down) * width + corner[:, 0] + right
            total += np.bincount(place, weight * near, minlength=height * width)
    return total.reshape(height, width)


def _cloud(rng: np.random.RandomState, height: int, width: int) -> Float64[np.ndarray, "H W"]:
    """Soft blotches of standard deviation 1."""
    small = gaussian_filter(rng.normal(size=(height // 8, width // 8)), 5, mode="wrap")
    cloud = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return cloud / cloud.std()


def _tint(value: Float64[np.ndarray, "H W"], look: _Look) -> UInt8[np.ndarray, "H W 3"]:
    """From standardised brightness to colours between `dark` and `light`."""
    grey = np.clip(look.mean + look.contrast * value, 0, 255)
    dark, light = np.asarray(look.dark, float), np.asarray(look.light, float)
    share = (grey - dark.mean()) / (light.mean() - dark.mean())
    colour = dark + share[..., None] * (light - dark)
    return (np.clip(colour, 0, 255) + 0.5).astype(np.uint8)
