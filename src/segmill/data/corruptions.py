"""The 15 common corruptions and the 4 extra ones, at five severities, each picture from its seed.

Formulas: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, https://arxiv.org/abs/1903.12261 (ImageNet-C), as Michaelis et al. widened
them to pictures of any size, https://arxiv.org/abs/1907.07484 (imagecorruptions). The original
draws from NumPy's global generator; here `RandomState(seed)` gives the same draws in the same
order, so `corrupt(image, name, severity, seed)` is what the original makes after
`numpy.random.seed(seed)`. Two of them no seed reaches in the original: glass_blur, which draws
inside compiled code (here the same draws come from the seed), and impulse_noise, where scikit-image
has a generator of its own (here the published rule with draws from the seed).
"""

import difflib
import hashlib
import os
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from segmill.data import corruption_blur as blur
from segmill.data import corruption_digital as digital
from segmill.data import corruption_noise as noise
from segmill.data import corruption_weather as weather
from segmill.data.frost_textures import load_frost
from segmill.errors import SegmillError

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # the extra ones
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels a side

_Picture = UInt8[np.ndarray, "H W 3"]
# All but frost, which also needs its textures.
_FUNCTIONS: dict[str, Callable[[_Picture, int, np.random.RandomState], _Picture]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": weather.spatter,
    "saturate": digital.saturate,
}


def corrupt(
    image: np.ndarray,
    name: str,
    severity: int,
    seed: int,
    frost_dir: str | os.PathLike[str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Corrupt an RGB image, uint8 (H, W, 3), with all its draws from `RandomState(seed)`.

    `frost_dir` holds the photographs frost1.png .. frost3.png, frost4.jpg, frost5.jpg of
    ImageNet-C. Without it frost takes textures that are generated here: it looks alike and is as
    bright, but numbers measured with it differ from the published frost. impulse_noise follows the
    published rule with draws of `RandomState`: no seed reproduces the original's.
    """
    check_corruption(name, severity)
    _check_image(image)
    image, rng = np.ascontiguousarray(image), np.random.RandomState(seed)
    if name == "frost":
        return weather.frost(image, severity, rng, load_frost(frost_dir))
    return _FUNCTIONS[name](image, severity, rng)


def corruption_seed(image_name: str, corruption: str, severity: int) -> int:
    """The seed of one picture of a corrupted data set: the same in every process and order."""
    text = f"{corruption}/{severity}/{image_name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def check_corruption(name: str, severity: int) -> None:
    """Refuse a corruption or a severity that does not exist."""
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SegmillError(
            f"There is no corruption {name!r}; {hint}There are {', '.join(CORRUPTIONS)}."
        )
    if severity not in SEVERITIES:
        raise SegmillError(
            f"Severity {severity} of {name} does not exist: severities are 1 (mild) to 5 (strong)."
        )


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SegmillError(
            f"Corruptions are defined for RGB images, uint8 (H, W, 3), 0..255; this one is "
            f"{image.dtype} {image.shape}. Convert it first (grey: repeat the channel; depth: "
            "leave it out)."
        )
    if min(image.shape[:2]) < SMALLEST:
        raise SegmillError(
            f"An image of {image.shape[0]} x {image.shape[1]} pixels is too small to be corrupted: "
            f"both sides must have {SMALLEST} pixels at least. Enlarge it first."
        )
