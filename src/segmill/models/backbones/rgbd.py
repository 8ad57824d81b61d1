"""What the two DFormer trunks share: the split of an RGB-D image, and convolutions of tokens.

Tokens are (B, h, w, D); such a map permuted to (B, D, h, w) is torch's channels-last layout, so
that going from one to the other moves nothing.
"""

from jaxtyping import Float
from torch import Tensor, nn

from segmill.errors import SegmillError


def colour_and_depth(
    image: Float[Tensor, "B C H W"],
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 1 H W"]]:
    """Channels 0 to 2, and channel 3; what follows repeats the depth in files that have it thrice.

    Both are channels-last in memory.
    """
    if image.shape[1] < 4:
        raise SegmillError(
            f"DFormer sees colour and depth, and this image has {image.shape[1]} channels. Choose "
            "RGB-D data with data.channels=4 (the fourth is depth), or another model."
        )
    return as_map(as_tokens(image[:, :3]).contiguous()), image[:, 3:4]


def as_tokens(feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B h w D"]:
    """Channels to the end."""
    return feature.permute(0, 2, 3, 1)


def as_map(tokens: Float[Tensor, "B h w D"]) -> Float[Tensor, "B D h w"]:
    """Channels to the front."""
    return tokens.permute(0, 3, 1, 2)


class Depthwise(nn.Conv2d):
    """One square kernel for every channel of a map of tokens, at its size."""

    def __init__(self, width: int, *, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # tokens, not `input`
        self, tokens: Float[Tensor, "B h w D"]
    ) -> Float[Tensor, "B h w D"]:
        return as_tokens(super().forward(as_map(tokens)))
