"""How kernels see maps of tokens: channels side by side, and pixels at one distance."""

from torch import Tensor


def readable(tokens: Tensor) -> Tensor:
    """`tokens` (B, h, w, D), whose pixels lie at one distance from each other; else a copy."""
    _, h, w, _ = tokens.shape
    of_image, of_row, of_pixel, of_channel = tokens.stride()
    if of_channel == 1 and of_row == w * of_pixel and of_image == h * of_row:
        return tokens
    return tokens.contiguous()
