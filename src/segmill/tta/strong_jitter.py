"""Strong jitter: colours, an affine map, a faint blur, a flip and noise.

Follows: the test-time transform that the public code of CoTTA (CVPR 2022, classification) and of
         RoTTA (CVPR 2023) share, with its ranges: brightness 0.6 to 1.4, contrast and gamma 0.7 to
         1.3, saturation 0.5 to 1.5, hue by 0.06, in random order; 15 degrees, an eighth of the
         side, scale 0.9 to 1.1; blur of 5 pixels with sigma up to 0.5; flip; noise of 0.005.
         There as here, all images of a batch are changed alike, but for the noise.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from segmill.draws import Generators
from segmill.draws import drawn as drawn_rows
from segmill.errors import SegmillError

Image = Float[Tensor, "B 3 H W"]  # RGB in 0..1
LUMA = (0.299, 0.587, 0.114)
RANGES = {
    "brightness": (0.6, 1.4),
    "contrast": (0.7, 1.3),
    "saturation": (0.5, 1.5),
    "hue": (-0.06, 0.06),
    "gamma": (0.7, 1.3),
    "degrees": (-15.0, 15.0),
    "right": (-0.125, 0.125),  # of the width
    "down": (-0.125, 0.125),  # of the height
    "scale": (0.9, 1.1),
    "sigma": (0.001, 0.5),
    "flip": (0.0, 1.0),
}
NOISE = 0.005


def strongly_jittered(
    image: UInt8[Tensor, "B C H W"], generator: torch.Generator, of_images: Generators | None = None
) -> Float[Tensor, "B C H W"]:
    """RGB of 0..255, changed at random: a few numbers from `generator`, which all images share.

    Then the noise, from `of_images` if there are any.
    """
    if image.shape[1] != 3:
        raise SegmillError(
            f"This method's augmentations are for RGB images; these have {image.shape[1]} "
            "channels. Choose another method, for example tta=tent or tta=eata."
        )
    drawn = torch.rand(2 * len(RANGES), generator=generator, device=generator.device).tolist()
    values = {
        name: low + (high - low) * share
        for (name, (low, high)), share in zip(RANGES.items(), drawn, strict=False)
    }
    order = sorted(COLOURS, key=lambda name: drawn[len(RANGES) + list(RANGES).index(name)])
    noise = drawn_rows(
        lambda count, of: torch.randn((count, *image.shape[1:]), generator=of, device=of.device),
        len(image),
        generator if of_images is None else of_images,
    )
    changed = image.float() / 255
    for name in order:
        changed = COLOURS[name](changed, values[name])
    changed = _blurred(_moved(changed, values), values["sigma"])
    if values["flip"] < 0.5:
        changed = changed.flip(3)
    return (changed + NOISE * noise.to(changed.device)).clamp(0, 1) * 255


def _grey(image: Image) -> Float[Tensor, "B 1 H W"]:
    weights = torch.tensor(LUMA, device=image.device).view(1, 3, 1, 1)
    return (image * weights).sum(dim=1, keepdim=True)


def _towards(image: Image, other: Float[Tensor, "B _c _h _w"], share: float) -> Image:
    return (share * image + (1 - share) * other).clamp(0, 1)


def _brightness(image: Image, factor: float) -> Image:
    return (factor * image).clamp(0, 1)


def _contrast(image: Image, factor: float) -> Image:
    return _towards(image, _grey(image).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(image: Image, factor: float) -> Image:
    return _towards(image, _grey(image), factor)


def _gamma(image: Image, power: float) -> Image:
    return image.clamp(min=1e-8).pow(power)


def _hue(image: Image, turn: float) -> Image:
    """Turn the colour circle by a share of it; value and saturation of HSV stay."""
    top, strongest = image.max(dim=1)
    chroma = top - image.amin(dim=1)
    red, green, blue = image.unbind(dim=1)
    safe = chroma.clamp(min=1e-12)
    sixths = torch.stack(
        [(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4]
    ).gather(0, strongest[None])[0]
    # A channel at n sixths from its own colour has top - chroma * clip(1 - distance).
    offsets = torch.tensor([5.0, 3.0, 1.0], device=image.device).view(1, 3, 1, 1)
    place = (offsets + (sixths + 6 * turn)[:, None]) % 6
    below = torch.minimum(place, 4 - place).clamp(0, 1)
    return top[:, None] - chroma[:, None] * below


COLOURS: dict[str, Callable[[Image, float], Image]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "gamma": _gamma,
}


def _moved(image: Image, values: dict[str, float]) -> Image:
    """Turned, scaled and shifted; beyond its edge the image goes on with its last pixels."""
    height, width = image.shape[2:]
    angle, scale = math.radians(values["degrees"]), values["scale"]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # In units of half a side, which differ for height and width.
    rows = [
        [cos, sin * height / width, 0.0],
        [-sin * width / height, cos, 0.0],
    ]
    matrix = torch.tensor(rows, device=image.device)
    shift = torch.tensor([2 * values["right"], 2 * values["down"]], device=image.device)
    matrix[:, 2] = -matrix[:, :2] @ shift
    grid = F.affine_grid(
        matrix.expand(len(image), 2, 3), [len(image), 3, height, width], align_corners=False
    )
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blurred(image: Image, sigma: float) -> Image:
    steps = torch.arange(-2.0, 3.0, device=image.device)
    kernel = (-0.5 * (steps / sigma).square()).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 5)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, kernel, groups=3)
    return F.conv2d(across, kernel.transpose(2, 3), groups=3)
