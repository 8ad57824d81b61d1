"""What the two DFormer trunks share: the split of an RGB-D image, and convolutions of tokens.

Tokens are (B, h, w, D).
"""

import jittor as jt
from jaxtyping import Float

from segmill.errors import SegmillError
from segmill.jittor.models.layers import Conv2d


def colour_and_depth(
    image: Float[jt.Var, "B C H W"],
) -> tuple[Float[jt.Var, "B 3 H W"], Float[jt.Var, "B 1 H W"]]:
    """Channels 0 to 2, and channel 3; files that hold the depth thrice repeat it behind that."""
    if image.shape[1] < 4:
        raise SegmillError(
            f"DFormer sees colour and depth, and this image has {image.shape[1]} channels. Choose "
            "RGB-D data with data.channels=4 (the fourth is depth), or another model."
        )
    return image[:, :3], image[:, 3:4]


def as_tokens(feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B h w D"]:
    """Channels to the end."""
    return feature.transpose(0, 2, 3, 1)


def as_map(tokens: Float[jt.Var, "B h w D"]) -> Float[jt.Var, "B D h w"]:
    """Channels to the front."""
    return tokens.transpose(0, 3, 1, 2)


class Depthwise(Conv2d):
    """One square kernel for every channel of a map of tokens, at its size."""

    def __init__(self, width: int, *, kernel: int) -> None:
        super().__init__(width, width, kernel, groups=width)

    def execute(self, tokens: Float[jt.Var, "B h w D"]) -> Float[jt.Var, "B h w D"]:
        return as_tokens(super().execute(as_map(tokens)))
