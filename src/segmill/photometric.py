"""Photometric distortion on the device: what `transforms.apply_jitter` does, for a whole batch.

The reference rounds to 8 bits after every step, twice through OpenCV's HSV; so does this, with the
same integers held in float32. Left over is OpenCV's own inconsistency in HSV -> RGB, which cuts off
in its vector code and rounds in the last pixels of a row: 1 level on < 1 % of the values, up to 4
once a second HSV step has turned it into another hue.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

_TURN = 180.0  # OpenCV's 8-bit hue counts steps of 2 degrees
_FIXED = 4096.0  # OpenCV's fixed-point scale in RGB -> HSV


@torch.no_grad()
def photometric_distortion(
    image: Num[Tensor, "B C H W"], jitter: Float[Tensor, "B J"]
) -> Float[Tensor, "B C H W"]:
    """Distort the first three channels of RGB(D) images in 0..255; see `transforms.JITTER`."""
    image = image.float()
    parameters = jitter.float()[..., None, None, None].unbind(1)
    brightness, contrast_first, contrast, saturation, hue = parameters
    colour = _cut(image[:, :3] + brightness)
    colour = _cut(colour * torch.where(contrast_first > 0, contrast, 1.0))
    colour = torch.where(saturation == 1, colour, _saturate(colour, saturation))
    colour = torch.where(hue == 0, colour, _turn_hue(colour, hue))
    colour = _cut(colour * torch.where(contrast_first > 0, 1.0, contrast))
    return torch.cat([colour, image[:, 3:]], dim=1)


def _saturate(
    colour: Float[Tensor, "B 3 H W"], factor: Float[Tensor, "B 1 1 1"]
) -> Float[Tensor, "B 3 H W"]:
    hue, saturation, value = _rgb_to_hsv(colour)
    return _hsv_to_rgb(hue, _cut(saturation * factor), value)


def _turn_hue(
    colour: Float[Tensor, "B 3 H W"], steps: Float[Tensor, "B 1 1 1"]
) -> Float[Tensor, "B 3 H W"]:
    hue, saturation, value = _rgb_to_hsv(colour)
    return _hsv_to_rgb((hue + steps) % _TURN, saturation, value)


def _cut(values: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    """What a conversion to 8 bits keeps."""
    return values.clamp(0, 255).floor()


def _rgb_to_hsv(
    colour: Float[Tensor, "B 3 H W"],
) -> tuple[Float[Tensor, "B 1 H W"], Float[Tensor, "B 1 H W"], Float[Tensor, "B 1 H W"]]:
    """Whole-numbered hue 0..179, saturation and value 0..255; every product is below 2^24."""
    red, green, blue = colour.split(1, dim=1)
    value = colour.amax(1, keepdim=True)
    spread = value - colour.amin(1, keepdim=True)
    sixth = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    # A grey pixel has spread 0 (a black one also value 0): both numerators are 0 there.
    hue_scale = torch.round(_TURN * _FIXED / 6 / spread.clamp_min(1))
    saturation_scale = torch.round(255 * _FIXED / value.clamp_min(1))
    hue = torch.floor((sixth * hue_scale + _FIXED / 2) / _FIXED)
    saturation = torch.floor((spread * saturation_scale + _FIXED / 2) / _FIXED)
    return torch.where(hue < 0, hue + _TURN, hue), saturation, value


def _hsv_to_rgb(
    hue: Float[Tensor, "B 1 H W"],
    saturation: Float[Tensor, "B 1 H W"],
    value: Float[Tensor, "B 1 H W"],
) -> Float[Tensor, "B 3 H W"]:
    sixth = hue * (6 / _TURN)
    sector = sixth.floor()
    rest = sixth - sector
    value, saturation = value * (1 / 255), saturation * (1 / 255)
    channels = []
    for offset in (5, 3, 1):  # red, green and blue are one curve, a third of a turn apart
        phase = (sector + offset) % 6
        part = torch.minimum(phase + rest, 4 - phase - rest).clamp(0, 1)
        channels.append(_cut(value * (1 - saturation * part) * 255))
    return torch.cat(channels, dim=1)
