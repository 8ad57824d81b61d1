"""AugMix: copies of an image, each a mixture of itself and of three chains of simple operations.

Paper:   Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and
         Uncertainty", ICLR 2020, https://arxiv.org/abs/1912.02781
Follows: MEMO's public code: first a random crop (0.08 to 1 of the area, resized) and a mirror
         image, then chains of one to three operations of severity 1, mixed by Dirichlet(1) and
         Beta(1, 1). `aligned` copies are for segmentation: no crop, and only operations that move
         no pixel; which copies are mirrored is said.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image as Pillow
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor

from segmill.errors import SegmillError

Operation = Callable[[Image, np.random.Generator], Image]
CHAINS, LONGEST = 3, 3
AREA, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of the crop
FILL = (128, 0, 0)  # what a moved image uncovers; PIL's reading of the code's `fillcolor=128`


def augmix_copies(
    image: UInt8[Tensor, "C H W"], count: int, generator: torch.Generator, *, aligned: bool
) -> tuple[Float[Tensor, "N C H W"], Bool[Tensor, " N"]]:
    """`count` copies in 0..255, and which of them are mirror images. Depth is only mirrored."""
    if not aligned and len(image) != 3:
        raise SegmillError(
            f"tta=memo crops and turns RGB images; these have {len(image)} channels. Choose "
            "another method, for example tta=tent or tta=eata."
        )
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    rng = np.random.default_rng(int(seed))
    picture = Pillow.fromarray(image[:3].movedim(0, -1).cpu().numpy())
    copies, mirrored = [], []
    for _ in range(count):
        start = picture if aligned else _cropped(picture, rng)
        mirror = bool(rng.random() < 0.5)
        start = ImageOps.mirror(start) if mirror else start
        copies.append(_mixed(start, PHOTOMETRIC if aligned else PHOTOMETRIC + GEOMETRIC, rng))
        mirrored.append(mirror)
    flips = torch.tensor(mirrored, device=image.device)
    rgb = torch.from_numpy(np.stack(copies)).movedim(-1, 1).to(image.device)
    if len(image) == 3:
        return rgb, flips
    depth = image[3:].float().expand(count, -1, -1, -1)
    depth = torch.where(flips.view(-1, 1, 1, 1), depth.flip(3), depth)
    return torch.cat([rgb, depth], dim=1), flips


def _mixed(
    start: Image, operations: tuple[Operation, ...], rng: np.random.Generator
) -> Float[np.ndarray, "H W 3"]:
    shares = rng.dirichlet([1.0] * CHAINS)
    own = rng.beta(1.0, 1.0)
    mixture = own * np.asarray(start, dtype=np.float32)
    for share in shares:
        changed = start
        for _ in range(rng.integers(1, LONGEST + 1)):
            changed = operations[rng.integers(len(operations))](changed, rng)
        mixture += (1 - own) * share * np.asarray(changed, dtype=np.float32)
    return mixture.astype(np.float32)


def _cropped(picture: Image, rng: np.random.Generator) -> Image:
    """A random part of the image at the image's size; all of it when no part would fit."""
    width, height = picture.size
    for _ in range(ATTEMPTS):
        area = rng.uniform(*AREA) * width * height
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = float(rng.integers(width - across + 1))
            top = float(rng.integers(height - down + 1))
            box = (left, top, left + across, top + down)
            return picture.resize(picture.size, Pillow.Resampling.BILINEAR, box=box)
    return picture


def _level(rng: np.random.Generator, most: float) -> float:
    """Of severity 1 out of 10."""
    return rng.uniform(0.1, 1.0) * most / 10


def _signed(rng: np.random.Generator, level: float) -> float:
    return -level if rng.random() > 0.5 else level


def _autocontrast(picture: Image, rng: np.random.Generator) -> Image:  # noqa: ARG001
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image, rng: np.random.Generator) -> Image:  # noqa: ARG001
    return ImageOps.equalize(picture)


def _solarize(picture: Image, rng: np.random.Generator) -> Image:
    return ImageOps.solarize(picture, 256 - int(_level(rng, 256.0)))


def _posterize(picture: Image, rng: np.random.Generator) -> Image:
    return ImageOps.posterize(picture, 4 - int(_level(rng, 4.0)))


def _rotate(picture: Image, rng: np.random.Generator) -> Image:
    degrees = _signed(rng, float(int(_level(rng, 30.0))))
    return picture.rotate(degrees, resample=Pillow.Resampling.BILINEAR, fillcolor=FILL)


def _affine(picture: Image, *, x: tuple[float, float], y: tuple[float, float]) -> Image:
    """`x` and `y` are slant and shift along each side."""
    data = (1, x[0], x[1], y[0], 1, y[1])
    return picture.transform(
        picture.size,
        Pillow.Transform.AFFINE,
        data,
        resample=Pillow.Resampling.BILINEAR,
        fillcolor=FILL,
    )


def _shear_x(picture: Image, rng: np.random.Generator) -> Image:
    return _affine(picture, x=(_signed(rng, _level(rng, 0.3)), 0.0), y=(0.0, 0.0))


def _shear_y(picture: Image, rng: np.random.Generator) -> Image:
    return _affine(picture, x=(0.0, 0.0), y=(_signed(rng, _level(rng, 0.3)), 0.0))


def _translate_x(picture: Image, rng: np.random.Generator) -> Image:
    return _affine(
        picture, x=(0.0, _signed(rng, float(int(_level(rng, picture.width / 3))))), y=(0.0, 0.0)
    )


def _translate_y(picture: Image, rng: np.random.Generator) -> Image:
    return _affine(
        picture, x=(0.0, 0.0), y=(0.0, _signed(rng, float(int(_level(rng, picture.height / 3)))))
    )


PHOTOMETRIC: tuple[Operation, ...] = (_autocontrast, _equalize, _solarize, _posterize)
GEOMETRIC: tuple[Operation, ...] = (_rotate, _shear_x, _shear_y, _translate_x, _translate_y)
