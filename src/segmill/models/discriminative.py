"""Discriminative: the model that is trained and adapted. Pixels in, logits or losses out.

Normalisation happens here, on the device, so that images travel as bytes. Weights belong to
`network`, which alone is saved: mean and std are part of the configuration.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor, nn

from segmill.errors import SegmillError


class Discriminative(nn.Module):
    """A network and the statistics of its input.

    `mean` and `std` are those of pixels in 0..1, one for each channel (the fourth is depth), in the
    network's order. Images are RGB everywhere else; a network whose weights expect blue first has
    `channel_order` bgr.
    """

    mean: Float[Tensor, "C 1 1"]  # of pixels in 0..255
    std: Float[Tensor, "C 1 1"]

    def __init__(
        self,
        *,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        channel_order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise SegmillError(
                f"model.mean has {len(mean)} values and model.std {len(std)}: {list(std)}. Give "
                "one of each for every channel, std above 0."
            )
        self.network = network
        self.channel_order = channel_order
        for name, values in (("mean", mean), ("std", std)):
            scaled = torch.tensor([255 * value for value in values]).view(-1, 1, 1)
            self.register_buffer(name, scaled, persistent=False)

    def normalise(
        self,
        image: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"],
        valid: Int64[Tensor, "B 4"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Map RGB of 0..255 to mean 0, std 1, in `channel_order`. It is 0 outside of `valid`.

        `valid` is the (top, left, bottom, right) that each image covers; padding is no black border
        but the mean colour, as in MMSegmentation.
        """
        if image.shape[1] != len(self.mean):
            raise SegmillError(
                f"The image has {image.shape[1]} channels, the model's mean and std are for "
                f"{len(self.mean)}. Choose a model for data.channels={image.shape[1]} (4 = RGB "
                "and depth), or set model.mean and model.std."
            )
        if self.channel_order == "bgr":
            image = torch.cat([image[:, :3].flip(1), image[:, 3:]], dim=1)
        normal = (image.float() - self.mean) / self.std
        if valid is None:
            return normal
        rows = torch.arange(image.shape[2], device=image.device)[:, None]
        columns = torch.arange(image.shape[3], device=image.device)
        top, left, bottom, right = valid.view(-1, 1, 1, 4).unbind(dim=-1)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        return normal.masked_fill_(~inside[:, None], 0.0)

    def forward(
        self, image: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B K h w"]:
        """Logits at the network's own stride, of pixels in 0..255."""
        return self.network(self.normalise(image))

    def losses(
        self,
        image: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"],
        label: Int[Tensor, "B _H _W"] | UInt8[Tensor, "B _H _W"],
        valid: Int64[Tensor, "B 4"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The network's loss terms; their sum is the loss. A classifier's label is 1 x 1."""
        losses = self.network.losses
        return losses(self.normalise(image, valid), label.long())  # pyright: ignore[reportCallIssue]
