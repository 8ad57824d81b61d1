"""The sizes and windows at which DFormer's evaluation looks at one image: plans, no pixels.

Both runtimes carry out the same plans (segmill.inference, and its twin for Jittor).
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from segmill.windows import window_starts

Size = tuple[int, int]


class View(NamedTuple):
    """How the network sees an image at one ratio; sizes and corners are (height or y, width or x).

    The normalised image is resized to `size` and then, if that is another size, to `canvas`, both
    bilinear with align_corners=True; it is mirrored between the two. The logits of each window, as
    large as `window`, are averaged on the canvas and leave it for the size of the original image.
    """

    size: Size
    canvas: Size  # `size`, or the window's where `size` is smaller in any direction
    window: Size  # the whole canvas when nothing slides
    corners: tuple[tuple[int, int], ...]  # top and left of every window, row by row


def plan_views(
    size: Size,
    *,
    ratios: Sequence[float],
    multiple: int | None,
    window: Size | None,
    stride: Size | None,
) -> list[View]:
    """One view for each ratio of an image of `size`; without a window the network sees it whole."""
    return [_planned(scaled_size(size, each, multiple), window, stride) for each in ratios]


def scaled_size(size: Size, ratio: float, multiple: int | None) -> Size:
    """Both sides times `ratio` rounded down, then up to a multiple; 360 x 480 gives 384 x 480."""
    height, width = int(size[0] * ratio), int(size[1] * ratio)
    if multiple is None:
        return height, width
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def window_corners(size: Size, window: Size, stride: Size) -> list[tuple[int, int]]:
    """Top and left of every window over an image of `size`, row by row."""
    tops = window_starts(size[0], window[0], stride[0]).tolist()
    lefts = window_starts(size[1], window[1], stride[1]).tolist()
    return list(product(tops, lefts))


def _planned(size: Size, window: Size | None, stride: Size | None) -> View:
    if window is None or stride is None:
        return View(size, size, size, ((0, 0),))
    fits = size[0] >= window[0] and size[1] >= window[1]
    canvas = size if fits else window
    return View(size, canvas, window, tuple(window_corners(canvas, window, stride)))
