"""What the two DFormer trunks share: the split of an RGB-D image, and layers of tokens.

Tokens are (B, h, w, D); such a map permuted to (B, D, h, w) is torch's channels-last layout, so
that going from one to the other moves nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.ops.depthwise_conv import depthwise_conv


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
        self,
        tokens: Float[Tensor, "B h w D"],
        *,
        added: Float[Tensor, "B h w D"] | None = None,
        gelu: bool = False,
    ) -> Float[Tensor, "B h w D"]:
        """With `added`, perhaps the tokens themselves, and then perhaps a GELU, in one pass."""
        assert self.bias is not None
        return depthwise_conv(tokens, self.weight, self.bias, added=added, gelu=gelu)


def projected(
    tokens: Float[Tensor, "B h w D"], *layers: nn.Linear
) -> tuple[Float[Tensor, "B h w _E"], ...]:
    """What each of the layers makes of the same tokens, by one matrix product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    widths = [layer.out_features for layer in layers]
    return F.linear(tokens, weight, bias).split(widths, dim=-1)
