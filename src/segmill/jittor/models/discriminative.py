"""Discriminative: the model that is trained. Pixels in, logits or losses out.

Weights belong to `network`, which alone is saved: mean and std are part of the configuration.
"""

from collections.abc import Sequence
from typing import Literal

import jittor as jt
import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from segmill.data.sample import IGNORE
from segmill.errors import SegmillError
from segmill.jittor.models.layers import constant

Pixels = UInt8[np.ndarray, "B C H W"] | Float[np.ndarray, "B C H W"]


class Discriminative(jt.Module):
    """A network and the statistics of its input.

    `mean` and `std` are those of pixels in 0..1, one for each channel (the fourth is depth), in the
    network's order. Images are RGB everywhere else; a network whose weights expect blue first has
    `channel_order` bgr.
    """

    def __init__(
        self,
        *,
        network: jt.Module,
        mean: Sequence[float],
        std: Sequence[float],
        channel_order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise SegmillError(
                f"model.mean has {len(mean)} values and model.std {len(std)}: {list(std)}. Give "
                "one of each for every channel, std above 0."
            )
        self.network = network
        self.channel_order = channel_order
        # Of pixels in 0..255; in numpy, so that they are no parameters.
        self.mean = 255 * np.asarray(mean, np.float32).reshape(-1, 1, 1)
        self.std = 255 * np.asarray(std, np.float32).reshape(-1, 1, 1)

    def train(self) -> "Discriminative":
        """Training mode; the optimizer alone decides which parameters have gradients."""
        return self._mode(training=True)

    def eval(self) -> "Discriminative":
        """Evaluation mode; predictions are made without gradients anyway (`inference`)."""
        return self._mode(training=False)

    def _mode(self, *, training: bool) -> "Discriminative":
        for _, module in self.named_modules():
            module.is_train = training
        return self

    def normalise(
        self, image: Pixels, valid: Int[np.ndarray, "B 4"] | None = None
    ) -> Float[jt.Var, "B C H W"]:
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
            image = np.concatenate([image[:, 2::-1], image[:, 3:]], axis=1)
        normal = (image.astype(np.float32) - self.mean) / self.std
        if valid is not None:
            rows, columns = np.arange(image.shape[2])[:, None], np.arange(image.shape[3])
            top, left, bottom, right = valid.T[:, :, None, None]
            inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
            normal *= inside[:, None]
        return constant(normal)

    def execute(self, image: Pixels) -> Float[jt.Var, "B K h w"]:
        """Logits at the network's own stride, of pixels in 0..255."""
        return self.network(self.normalise(image))

    def losses(
        self,
        image: Pixels,
        label: Integer[np.ndarray, "B H W"],
        valid: Int[np.ndarray, "B 4"] | None = None,
    ) -> dict[str, Float[jt.Var, "1"]]:
        """The network's loss terms; their sum is the training loss."""
        num_classes = self.network.decode_head.conv_seg.weight.shape[0]
        wrong = (label >= num_classes) & (label != IGNORE)
        if wrong.any():
            raise SegmillError(
                f"The label has the value {label[wrong][0]}, but there are {num_classes} classes "
                f"(ignored: {IGNORE}). Map it with data.label_map, or correct data.num_classes."
            )
        return self.network.losses(self.normalise(image, valid), constant(label.astype(np.int32)))
