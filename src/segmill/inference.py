"""Logits and labels of one image under a protocol: MMSegmentation 1.2.2's chain of resizes.

logits at the network's stride -> size of its input (of each window, when sliding) -> padding
removed -> mirrored back -> size of the original image -> argmax. Windows average logits; scales
and mirror images average softmax probabilities, both at the size the reference does it.

Every step before the softmax treats the classes independently, so a label map is made a few
classes at a time: the (K, H, W) logits at full size never exist, and each number is the
reference's to the last bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import EllipsisType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from segmill.ops.upsample_argmax import upsample_argmax
from segmill.protocol import Protocol
from segmill.windows import window_starts

Network = Callable[[Tensor], Tensor]

# Fills a GPU at 512 x 512 and costs less memory than a training batch. No result depends on it.
WINDOWS_PER_BATCH = 8
# Full-size values of so many bytes at a time: stays in the cache of a CPU, fills a GPU.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def predict_logits(
    network: Network,
    images: Sequence[Float[Tensor, "1 C _h _w"]],
    size: tuple[int, int],
    protocol: Protocol,
) -> Float[Tensor, "1 K H W"]:
    """Logits at `size`; mean probabilities when the protocol has several scales or mirrors."""
    if not protocol.averages_probabilities:
        (view,) = _views(network, images[0], protocol)
        return view.logits(slice(None), size)
    views = (view for image in images for view in _views(network, image, protocol))
    total = next(views).logits(slice(None), size).softmax(dim=1)
    for view in views:
        total += view.logits(slice(None), size).softmax(dim=1)
    return total.div_(len(images) * (2 if protocol.flip else 1))


def predict_label(
    network: Network,
    images: Sequence[Float[Tensor, "1 C _h _w"]],
    size: tuple[int, int],
    protocol: Protocol,
) -> Integer[Tensor, "1 H W"]:
    """Classes at `size`: uint8, or int64 for more than 256 classes."""
    if protocol.averages_probabilities:
        prob = predict_logits(network, images, size, protocol)
        return prob.argmax(dim=1).to(_label_dtype(prob.shape[1]))
    (view,) = _views(network, images[0], protocol)
    if view.is_one_resize(size):
        (logits,) = view.tiles
        label = upsample_argmax(logits, size, align_corners=view.align_corners)
        return label.to(_label_dtype(logits.shape[1]))
    return view.label(size)


def label_of_logits(
    logits: Float[Tensor, "1 K h w"],
    content: tuple[int, int],
    size: tuple[int, int],
    protocol: Protocol,
) -> Integer[Tensor, "1 H W"]:
    """Classes at `size` of an image that was `content` large when the network saw it, whole."""
    view = _View(
        [logits],
        [(0, 0)],
        content,
        content,
        content,
        mirrored=False,
        align_corners=protocol.align_corners,
    )
    if view.is_one_resize(size):
        label = upsample_argmax(logits.float(), size, align_corners=protocol.align_corners)
        return label.to(_label_dtype(logits.shape[1]))
    return view.label(size)


def slide_logits(
    network: Network,
    image: Float[Tensor, "1 C H W"],
    *,
    window: Sequence[int],
    stride: Sequence[int],
    batch: int,
    align_corners: bool = False,
) -> Float[Tensor, "1 K H W"]:
    """Logits at the image's size: the mean over the windows that cover a pixel."""
    size = image.shape[-2], image.shape[-1]
    window = min(window[0], size[0]), min(window[1], size[1])
    corners, tiles = _run_windows(network, image, window, stride, batch)
    view = _View(tiles, corners, window, size, size, mirrored=False, align_corners=align_corners)
    return view.logits(slice(None), size)


@dataclass(frozen=True)
class _View:
    """What the network said about one image, and where each piece of it belongs."""

    tiles: Sequence[Float[Tensor, "1 K h w"]]  # at the network's stride
    corners: Sequence[tuple[int, int]]  # top and left of each tile in the network's input
    window: tuple[int, int]
    padded: tuple[int, int]  # the network's input
    content: tuple[int, int]  # of which the image covers the top left
    mirrored: bool
    align_corners: bool

    def is_one_resize(self, size: tuple[int, int]) -> bool:
        return len(self.tiles) == 1 and self.padded == self.content == size and not self.mirrored

    def logits(self, classes: slice, size: tuple[int, int]) -> Float[Tensor, "1 k H W"]:
        """Some classes' logits at the original size."""
        at_input = self._merged(classes)
        return to_original(
            at_input,
            content=self.content,
            mirrored=self.mirrored,
            size=size,
            align_corners=self.align_corners,
        )

    def label(self, size: tuple[int, int]) -> Integer[Tensor, "1 H W"]:
        """Argmax at the original size, a few classes at a time; ties go to the lower class."""
        num_classes, device = self.tiles[0].shape[1], self.tiles[0].device
        largest = 4 * max(math.prod(size), math.prod(self.padded))
        step = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // largest)
        best = torch.full((1, *size), -math.inf, device=device)
        label = torch.zeros((1, *size), dtype=_label_dtype(num_classes), device=device)
        for start in range(0, num_classes, step):
            _keep_larger(best, label, self.logits(slice(start, start + step), size), start)
        return label

    def _merged(self, classes: slice) -> Float[Tensor, "1 k Hp Wp"]:
        """Logits at the size of the network's input; where windows overlap, their mean."""
        if len(self.tiles) == 1:
            return self._upsampled(self.tiles[0][:, classes])
        first = self.tiles[0][:, classes]
        total = first.new_zeros((1, first.shape[1], *self.padded), dtype=torch.float32)
        for tile, area in zip(self.tiles, self._areas, strict=True):
            total[area] += self._upsampled(tile[:, classes])
        return total.div_(self._coverage)

    @property
    def _areas(self) -> list[tuple[EllipsisType, slice, slice]]:
        height, width = self.window
        return [(..., slice(y, y + height), slice(x, x + width)) for y, x in self.corners]

    @cached_property
    def _coverage(self) -> Float[Tensor, "Hp Wp"]:
        """How many windows cover a pixel."""
        count = torch.zeros(self.padded, device=self.tiles[0].device)
        for area in self._areas:
            count[area] += 1
        return count

    def _upsampled(self, tile: Float[Tensor, "1 k h w"]) -> Float[Tensor, "1 k H W"]:
        # float32 also under bf16 autocast: the argmax of neighbours is decided in the last bits.
        return _resize(tile.float(), self.window, self.align_corners)


def _keep_larger(
    best: Float[Tensor, "1 H W"],
    label: Integer[Tensor, "1 H W"],
    logits: Float[Tensor, "1 k H W"],
    start: int,
) -> None:
    """Take over, in place, where one of the classes `start`... has the largest logit so far."""
    if logits.is_cuda:  # one kernel for all classes
        value, index = logits.max(dim=1)
        label.copy_(torch.where(value > best, index + start, label))
        torch.maximum(best, value, out=best)
        return
    for offset, value in enumerate(logits.unbind(dim=1)):  # contiguous; dim 1 is not
        label.masked_fill_(value > best, start + offset)
        torch.maximum(best, value, out=best)


def to_original(
    logits: Float[Tensor, "1 k Hp Wp"],
    *,
    content: tuple[int, int],
    mirrored: bool,
    size: tuple[int, int],
    align_corners: bool,
) -> Float[Tensor, "1 k H W"]:
    """Remove the padding, mirror back, resize to the original image: MMSegmentation's last step."""
    logits = logits[..., : content[0], : content[1]]
    if mirrored:
        logits = logits.flip(dims=(3,))
    return _resize(logits, size, align_corners)


def _views(network: Network, image: Float[Tensor, "1 C h w"], protocol: Protocol) -> list[_View]:
    """Run the network on one scale: the image, and its mirror image in the same batch."""
    content = image.shape[-2], image.shape[-1]
    if protocol.flip:
        image = torch.cat([image, image.flip(dims=(3,))])
    image = _padded(image, protocol.pad_divisor)
    padded = window = image.shape[-2], image.shape[-1]
    if protocol.window is not None and protocol.stride is not None and protocol.mode == "slide":
        window = min(protocol.window[0], padded[0]), min(protocol.window[1], padded[1])
        corners, tiles = _run_windows(network, image, window, protocol.stride, WINDOWS_PER_BATCH)
    else:
        corners, tiles = [(0, 0)], [network(image)]
    return [
        _View(
            [tile[index : index + 1] for tile in tiles],
            corners,
            window,
            padded,
            content,
            index == 1,
            protocol.align_corners,
        )
        for index in range(len(image))
    ]


def _run_windows(
    network: Network,
    image: Float[Tensor, "B C H W"],
    window: tuple[int, int],
    stride: Sequence[int],
    batch: int,
) -> tuple[list[tuple[int, int]], list[Float[Tensor, "B K h w"]]]:
    """Top left corners of the windows, row by row, and the network's logits on each."""
    images, (height, width) = len(image), window
    tops = window_starts(image.shape[-2], height, stride[0]).tolist()
    lefts = window_starts(image.shape[-1], width, stride[1]).tolist()
    corners = list(product(tops, lefts))
    tiles: list[Tensor] = []
    for start in range(0, len(corners), batch):
        part = corners[start : start + batch]
        windows = torch.cat([image[..., y : y + height, x : x + width] for y, x in part])
        tiles.extend(network(windows).split(images))
    return corners, tiles


def _padded(image: Float[Tensor, "B C h w"], divisor: int | None) -> Float[Tensor, "B C H W"]:
    if divisor is None:
        return image
    height, width = image.shape[-2:]
    # Zero is the mean colour: the image is normalised already.
    return F.pad(image, (0, -width % divisor, 0, -height % divisor))


def _resize(
    logits: Float[Tensor, "B k h w"], size: tuple[int, int], align_corners: bool
) -> Float[Tensor, "B k H W"]:
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits  # a bilinear resize to the same size changes nothing
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def _label_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int64
