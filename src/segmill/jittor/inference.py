"""Classes of one image under a protocol: `segmill.inference` on Jittor, step for step.

The same views in the same batches, so that a network that draws random numbers draws the same ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jittor as jt
import numpy as np
from jaxtyping import Float, Integer

from segmill.jittor.models.layers import resize
from segmill.protocol import Protocol
from segmill.views import View, window_corners

Network = Callable[[jt.Var], jt.Var]
Size = tuple[int, int]

# As in segmill.inference: the draws of a batch depend on its size.
WINDOWS_PER_BATCH = 8


def predict_label(
    network: Network, images: Sequence[Float[jt.Var, "1 C _h _w"]], size: Size, protocol: Protocol
) -> Integer[np.ndarray, "1 H W"]:
    """Classes at `size`, of the normalised `Protocol.inputs`: uint8, or int64 for over 256."""
    # DFormer's padding is removed only after the argmax.
    target = size if protocol.follows == "mmseg" else _size(images[0])
    with jt.no_grad():
        views = [view.logits(target) for view in _all_views(network, images, protocol)]
        if protocol.averages_probabilities:
            views = [jt.nn.softmax(view, dim=1) for view in views]
        total = views[0]
        for view in views[1:]:
            total = total + view
        label = total.numpy().argmax(axis=1)[:, : size[0], : size[1]]
    return label.astype(np.uint8 if total.shape[1] <= 256 else np.int64)


@dataclass(frozen=True)
class _View:
    """What the network said about one image, and where each piece of it belongs."""

    tiles: Sequence[Float[jt.Var, "1 K h w"]]
    corners: Sequence[Size]
    window: Size
    padded: Size  # the network's input
    content: Size  # of which the image covers the top left
    mirrored: bool
    align_corners: bool  # from the tiles to their windows
    back_align_corners: bool  # from the network's input to the original image

    def logits(self, size: Size) -> Float[jt.Var, "1 K H W"]:
        """Logits at the original size, waited for: so one view frees its memory before the next."""
        height, width = self.content
        logits = self._merged()[:, :, :height, :width]
        if self.mirrored:
            logits = logits.flip(3)
        logits = resize(logits, size, align_corners=self.back_align_corners)
        logits.sync()
        return logits

    def _merged(self) -> Float[jt.Var, "1 K H W"]:
        """At the size of the network's input; where windows overlap, their mean."""
        tiles = [resize(tile, self.window, align_corners=self.align_corners) for tile in self.tiles]
        if len(tiles) == 1:
            return tiles[0]
        height, width = self.window
        total = np.zeros((1, tiles[0].shape[1], *self.padded), np.float32)
        count = np.zeros(self.padded, np.float32)
        for tile, (top, left) in zip(tiles, self.corners, strict=True):
            total[..., top : top + height, left : left + width] += tile.numpy()
            count[top : top + height, left : left + width] += 1
        return jt.array(total / count)


def _all_views(
    network: Network, images: Sequence[Float[jt.Var, "1 C _h _w"]], protocol: Protocol
) -> Iterator[_View]:
    if protocol.follows == "mmseg":
        for image in images:
            yield from _views(network, image, protocol)
        return
    (image,) = images
    for plan in protocol.views(_size(image)):
        yield from _planned_views(network, image, plan, flip=protocol.flip)


def _views(network: Network, image: Float[jt.Var, "1 C h w"], protocol: Protocol) -> list[_View]:
    """MMSegmentation's chain on one scale: the image, and its mirror image in the same batch."""
    content = _size(image)
    image = _padded(_with_mirror(image) if protocol.flip else image, protocol.pad_divisor)
    window, corners = _size(image), [(0, 0)]
    if protocol.window is not None and protocol.stride is not None and protocol.mode == "slide":
        window = min(protocol.window[0], window[0]), min(protocol.window[1], window[1])
        corners = window_corners(_size(image), window, (protocol.stride[0], protocol.stride[1]))
    aligned = protocol.align_corners
    return _run_views(network, image, corners, window, content, (aligned, aligned))


def _planned_views(
    network: Network, image: Float[jt.Var, "1 C h w"], plan: View, *, flip: bool
) -> list[_View]:
    """DFormer's chain by a plan: resized, mirrored, stretched to the window."""
    image = resize(image, plan.size, align_corners=True)
    image = resize(_with_mirror(image) if flip else image, plan.canvas, align_corners=True)
    return _run_views(network, image, plan.corners, plan.window, plan.canvas, (False, True))


def _run_views(
    network: Network,
    image: Float[jt.Var, "B C H W"],
    corners: Sequence[Size],
    window: Size,
    content: Size,
    aligned: tuple[bool, bool],
) -> list[_View]:
    """Run the network: a view of the image, and one of its mirror image if there is one."""
    tiles = _run_windows(network, image, corners, window)
    return [
        _View(
            [tile[index : index + 1] for tile in tiles],
            corners,
            window,
            _size(image),
            content,
            mirrored=index == 1,
            align_corners=aligned[0],
            back_align_corners=aligned[1],
        )
        for index in range(len(image))
    ]


def _run_windows(
    network: Network, image: Float[jt.Var, "B C H W"], corners: Sequence[Size], window: Size
) -> list[Float[jt.Var, "B K h w"]]:
    images, (height, width) = len(image), window
    if len(corners) == 1:
        return [network(image)]
    tiles: list[jt.Var] = []
    for start in range(0, len(corners), WINDOWS_PER_BATCH):
        part = corners[start : start + WINDOWS_PER_BATCH]
        windows = jt.concat([image[:, :, y : y + height, x : x + width] for y, x in part], dim=0)
        logits = network(windows)
        tiles += [logits[first : first + images] for first in range(0, len(windows), images)]
    return tiles


def _with_mirror(image: Float[jt.Var, "1 C h w"]) -> Float[jt.Var, "2 C h w"]:
    return jt.concat([image, image.flip(3)], dim=0)


def _padded(image: Float[jt.Var, "B C h w"], divisor: int | None) -> Float[jt.Var, "B C H W"]:
    if divisor is None:
        return image
    height, width = _size(image)
    # Zero is the mean colour: the image is normalised already.
    return jt.nn.pad(image, (0, -width % divisor, 0, -height % divisor))


def _size(image: Float[jt.Var, "B C H W"]) -> Size:
    return image.shape[-2], image.shape[-1]
