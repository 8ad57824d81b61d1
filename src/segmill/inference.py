"""Logits and labels of one image under a protocol: MMSegmentation 1.2.2's chain of resizes.

logits at the network's stride -> size of its input (of each window, when sliding) -> padding
removed -> mirrored back -> size of the original image -> argmax. Windows average logits; scales
and mirror images average softmax probabilities, both at the size the reference does it.

Every step before the softmax treats the classes independently, so a label map is made a few
classes at a time: the (K, H, W) logits at full size never exist, and each number is the
reference's to the last bit.

DFormer's chain (`protocol.follows`) differs in who resizes the image: here, after normalisation,
for every ratio by the plan of segmill.views, with align_corners=True there and back. Its single
view is judged by logits too: their argmax is that of the softmax, but for ties by rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from segmill.errors import SegmillError
from segmill.ops.upsample_argmax import upsample_argmax
from segmill.protocol import Protocol
from segmill.views import View, window_corners

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
    """Logits at `size`; mean probabilities when the protocol has several scales or mirrors.

    `images` are those of `Protocol.inputs`, normalised.
    """
    target = _target(images, size, protocol)
    if not protocol.averages_probabilities:
        (view,) = _all_views(network, images, protocol)
        return _cut(view.logits(slice(None), target), size)
    total, count = _summed_prob(network, images, target, protocol)
    return _cut(total.div_(count), size)


def predict_log_prob(
    network: Network, images: Sequence[Float[Tensor, "1 C _h _w"]], protocol: Protocol
) -> Float[Tensor, "1 K"]:
    """Of an image with one label: logarithms of its classes' probabilities, finite where these are.

    `images` as above; several views are averaged as probabilities.
    """
    found = predict_logits(network, images, (1, 1), protocol).flatten(1).float()
    if protocol.averages_probabilities:
        return found.clamp(min=torch.finfo(found.dtype).tiny).log()
    return found.log_softmax(dim=1)


def predict_label(
    network: Network,
    images: Sequence[Float[Tensor, "1 C _h _w"]],
    size: tuple[int, int],
    protocol: Protocol,
) -> Integer[Tensor, "1 H W"]:
    """Classes at `size`: uint8, or int64 for more than 256 classes."""
    target = _target(images, size, protocol)
    if protocol.averages_probabilities:
        prob, count = _summed_prob(network, images, target, protocol)
        if protocol.follows == "mmseg":  # DFormer takes the argmax of the sum
            prob.div_(count)
        return _cut(prob.argmax(dim=1).to(_label_dtype(prob.shape[1])), size)
    (view,) = _all_views(network, images, protocol)
    return _cut(_label_of_view(view, target), size)


def label_of_logits(
    logits: Float[Tensor, "1 K h w"],
    content: tuple[int, int],
    size: tuple[int, int],
    protocol: Protocol,
) -> Integer[Tensor, "1 H W"]:
    """Classes at `size` of an image that was `content` large when the network saw it, whole."""
    if protocol.resizes_on_device:
        raise SegmillError(
            f"protocol={protocol.name} resizes the image after normalisation, and these logits are "
            "of an image that was not: protocol.multiple=null protocol.ratios=[1.0] leaves its "
            "size, as does protocol=nyu_ss."
        )
    view = _View(
        [logits.float()],
        [(0, 0)],
        content,
        content,
        content,
        mirrored=False,
        align_corners=protocol.align_corners,
        back_align_corners=protocol.align_corners,
    )
    return _cut(_label_of_view(view, content if protocol.follows == "dformer" else size), size)


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
    corners = window_corners(size, window, (stride[0], stride[1]))
    view = _View(
        _run_windows(network, image, corners, window, batch),
        corners,
        window,
        size,
        size,
        mirrored=False,
        align_corners=align_corners,
        back_align_corners=align_corners,
    )
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
    align_corners: bool  # from the tiles to their windows
    back_align_corners: bool  # from the network's input to the original image

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
            align_corners=self.back_align_corners,
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


def _label_of_view(view: _View, size: tuple[int, int]) -> Integer[Tensor, "1 H W"]:
    if not view.is_one_resize(size):
        return view.label(size)
    (logits,) = view.tiles
    label = upsample_argmax(logits, size, align_corners=view.align_corners)
    return label.to(_label_dtype(logits.shape[1]))


def _summed_prob(
    network: Network,
    images: Sequence[Float[Tensor, "1 C _h _w"]],
    size: tuple[int, int],
    protocol: Protocol,
) -> tuple[Float[Tensor, "1 K H W"], int]:
    """The sum of all views' probabilities, and how many views there are."""
    views = _all_views(network, images, protocol)
    total, count = next(views).logits(slice(None), size).softmax(dim=1), 1
    for view in views:
        total += view.logits(slice(None), size).softmax(dim=1)
        count += 1
    return total, count


def _target(
    images: Sequence[Float[Tensor, "1 C _h _w"]], size: tuple[int, int], protocol: Protocol
) -> tuple[int, int]:
    """The size that logits are resized to: DFormer's padding is removed only after the argmax."""
    if protocol.follows == "mmseg":
        return size
    (image,) = images
    return image.shape[-2], image.shape[-1]


def _cut(at_target: Tensor, size: tuple[int, int]) -> Tensor:
    return at_target[..., : size[0], : size[1]]


def _all_views(
    network: Network, images: Sequence[Float[Tensor, "1 C _h _w"]], protocol: Protocol
) -> Iterator[_View]:
    """One at a time, so that the next one runs when this one's memory is free again."""
    if protocol.follows == "mmseg":
        for image in images:
            yield from _views(network, image, protocol)
        return
    (image,) = images
    for plan in protocol.views((image.shape[-2], image.shape[-1])):
        yield from _planned_views(network, image, plan, flip=protocol.flip)


def _views(network: Network, image: Float[Tensor, "1 C h w"], protocol: Protocol) -> list[_View]:
    """Run the network on one scale: the image, and its mirror image in the same batch."""
    content = image.shape[-2], image.shape[-1]
    image = _padded(_with_mirror(image) if protocol.flip else image, protocol.pad_divisor)
    padded = window = image.shape[-2], image.shape[-1]
    corners = [(0, 0)]
    if protocol.window is not None and protocol.stride is not None and protocol.mode == "slide":
        window = min(protocol.window[0], padded[0]), min(protocol.window[1], padded[1])
        corners = window_corners(padded, window, (protocol.stride[0], protocol.stride[1]))
    return _run_views(
        network,
        image,
        corners,
        window,
        content=content,
        align_corners=protocol.align_corners,
        back_align_corners=protocol.align_corners,
    )


def _planned_views(
    network: Network, image: Float[Tensor, "1 C h w"], plan: View, *, flip: bool
) -> list[_View]:
    """The same by a plan of DFormer's chain: resized, mirrored, stretched to the window."""
    image = _resize(image, plan.size, align_corners=True)
    image = _resize(_with_mirror(image) if flip else image, plan.canvas, align_corners=True)
    return _run_views(
        network,
        image,
        plan.corners,
        plan.window,
        content=plan.canvas,
        align_corners=False,
        back_align_corners=True,
    )


def _run_views(
    network: Network,
    image: Float[Tensor, "B C H W"],
    corners: Sequence[tuple[int, int]],
    window: tuple[int, int],
    *,
    content: tuple[int, int],
    align_corners: bool,
    back_align_corners: bool,
) -> list[_View]:
    """Run the network: a view of the image, and one of its mirror image if there is one."""
    tiles = _run_windows(network, image, corners, window, WINDOWS_PER_BATCH)
    return [
        _View(
            [tile[index : index + 1] for tile in tiles],
            corners,
            window,
            (image.shape[-2], image.shape[-1]),
            content,
            mirrored=index == 1,
            align_corners=align_corners,
            back_align_corners=back_align_corners,
        )
        for index in range(len(image))
    ]


def _with_mirror(image: Float[Tensor, "1 C h w"]) -> Float[Tensor, "2 C h w"]:
    return torch.cat([image, image.flip(dims=(3,))])


def _run_windows(
    network: Network,
    image: Float[Tensor, "B C H W"],
    corners: Sequence[tuple[int, int]],
    window: tuple[int, int],
    batch: int,
) -> list[Float[Tensor, "B K h w"]]:
    """The network's logits on each window."""
    images, (height, width) = len(image), window
    if len(corners) == 1:
        return [network(image)]
    tiles: list[Tensor] = []
    for start in range(0, len(corners), batch):
        part = corners[start : start + batch]
        windows = torch.cat([image[..., y : y + height, x : x + width] for y, x in part])
        tiles.extend(network(windows).split(images))
    return tiles


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
