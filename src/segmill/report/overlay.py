"""Class maps as pictures: in colour, over the image, as errors, and their legend.

Everything here is RGB. A fourth channel of an image (depth) is left out.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Integer, UInt8
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageDraw, ImageFont

HATCH = np.array([[205, 205, 210], [165, 165, 172]], dtype=np.uint8)  # no palette is striped
WRONG = np.array([230, 40, 50], dtype=np.uint8)
FONT_SIZE = 18

Picture = UInt8[np.ndarray, "H W 3"]


def colourise(
    label: Integer[np.ndarray, "H W"], palette: UInt8[np.ndarray, "K 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Paint every class in its colour; whatever is none of the K classes is hatched grey."""
    known = (label >= 0) & (label < len(palette))
    colours = palette[np.where(known, label, 0)]
    return np.where(known[..., None], colours, _hatch(label.shape))


def overlay(
    image: UInt8[np.ndarray, "H W C"],
    pred: Integer[np.ndarray, "H W"],
    palette: UInt8[np.ndarray, "K 3"],
    *,
    alpha: float,
) -> UInt8[np.ndarray, "H W 3"]:
    """Mix `alpha` of the class colours into the image, with full colour where classes meet."""
    colours = colourise(pred, palette)
    mixed = cv2.addWeighted(image[..., :3], 1 - alpha, colours, alpha, 0)
    return np.where(_borders(pred)[..., None], colours, mixed)


def error_map(
    image: UInt8[np.ndarray, "H W C"],
    label: Integer[np.ndarray, "H W"],
    pred: Integer[np.ndarray, "H W"],
    *,
    ignore_index: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """Wrong pixels in red on a pale grey image; pixels that do not count are hatched."""
    grey = cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2GRAY)
    pale = (150 + grey // 3).astype(np.uint8)[..., None].repeat(3, axis=-1)
    counted = (label != ignore_index)[..., None]
    shown = np.where((label != pred)[..., None], WRONG, pale)
    return np.where(counted, shown, _hatch(label.shape))


def legend(names: Sequence[str], palette: UInt8[np.ndarray, "K 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """One line a class: colour, index, and its name if an installed font can write it."""
    entries = [(f"{index}  {name}", _font(f"{index}  {name}")) for index, name in enumerate(names)]
    lines = [
        (text, font) if font else (f"{index}", ImageFont.truetype(str(_plain_font()), FONT_SIZE))
        for index, (text, font) in enumerate(entries)
    ]
    row = FONT_SIZE + 12
    width = 64 + max(int(font.getlength(text)) for text, font in lines)
    sheet = Image.new("RGB", (width, row * len(lines) + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (text, font) in enumerate(lines):
        top = 6 + row * index
        colour = tuple(int(part) for part in palette[index])
        draw.rectangle((10, top + 4, 40, top + row - 5), fill=colour, outline="grey")
        draw.text((50, top + row // 2), text, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def _hatch(shape: tuple[int, ...]) -> UInt8[np.ndarray, "H W 3"]:
    height, width = shape
    return HATCH[(np.arange(height)[:, None] + np.arange(width)) // 4 % 2]


def _borders(pred: Integer[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels whose right or lower neighbour is of another class."""
    border = np.zeros(pred.shape, dtype=bool)
    border[:, :-1] |= pred[:, :-1] != pred[:, 1:]
    border[:-1] |= pred[:-1] != pred[1:]
    return border


def _font(text: str) -> ImageFont.FreeTypeFont | None:
    """The first font that can write every character of `text`: ours, else the system's."""
    wanted = {ord(character) for character in text}
    if wanted <= _characters(_plain_font()):
        return ImageFont.truetype(str(_plain_font()), FONT_SIZE)
    for path in _system_fonts():
        if wanted <= _characters(path):
            return ImageFont.truetype(str(path), FONT_SIZE)
    return None


def _plain_font() -> Path:
    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _system_fonts() -> tuple[Path, ...]:
    """Upright text fonts first; fonts of one script only would come before them by name."""
    entries = {Path(entry.fname): entry for entry in font_manager.fontManager.ttflist}
    plain = [
        path
        for path, entry in entries.items()
        if entry.style == "normal"
        and entry.weight in (400, "normal")
        and "LastResort" not in path.name  # covers all of Unicode, with boxes
    ]
    return tuple(sorted(plain, key=lambda path: ("Sans" not in path.name, path.name)))


@cache
def _characters(font: Path) -> frozenset[int]:
    return frozenset(font_manager.get_font(str(font)).get_charmap())
