"""Corruptions by noise: gaussian, shot, impulse, speckle.

Formulas: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, https://arxiv.org/abs/1903.12261; for pictures of any size: Michaelis et al.,
"Benchmarking Robustness in Object Detection", 2019, https://arxiv.org/abs/1907.07484
(imagecorruptions). Severity 1..5 picks a row of each table.
"""

import numpy as np
from jaxtyping import UInt8

from segmill.data.corruption_steps import picture, unit

_GAUSSIAN_SCALE = (0.08, 0.12, 0.18, 0.26, 0.38)
_SHOT_PHOTONS = (60, 25, 12, 5, 3)  # counted at full white
_IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)
_SPECKLE_SCALE = (0.15, 0.2, 0.35, 0.45, 0.6)


def gaussian_noise(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Add normal noise: a sensor in low light."""
    noise = rng.normal(scale=_GAUSSIAN_SCALE[severity - 1], size=image.shape)
    noise += unit(image)
    return picture(noise)


def shot_noise(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Count photons: Poisson noise."""
    photons = _SHOT_PHOTONS[severity - 1]
    return picture(rng.poisson(unit(image) * photons) / photons)


def impulse_noise(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Salt and pepper, each channel value on its own.

    The original leaves these draws to a generator of scikit-image that no seed reaches, so no
    published picture can be reproduced: the rule is the published one, the draws are ours.
    """
    flipped = rng.random_sample(image.shape) <= _IMPULSE_SHARE[severity - 1]
    salt = rng.random_sample(image.shape) <= 0.5
    values = np.where(salt, np.uint8(255), np.uint8(0))
    # Through [0, 1] and back, as the original: the cut-off takes a level from some values.
    return np.where(flipped, values, picture(unit(image)))


def speckle_noise(
    image: UInt8[np.ndarray, "H W 3"], severity: int, rng: np.random.RandomState
) -> UInt8[np.ndarray, "H W 3"]:
    """Multiply by normal noise around 1."""
    values = unit(image)
    noise = rng.normal(scale=_SPECKLE_SCALE[severity - 1], size=image.shape)
    noise *= values
    noise += values
    return picture(noise)
