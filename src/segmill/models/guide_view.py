"""GuideView: how a guide sees an image, as windows of one size, and what falls on its latent cells.

Windows lie along the long side, whatever its direction; the rule of their starts is the one of
sliding-window inference. Logits are read at the centres of the latent cells by one `grid_sample`,
because window starts are multiples of neither the logits' stride nor the cell.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from segmill.errors import SegmillError
from segmill.windows import window_starts


@dataclass(frozen=True, kw_only=True)
class GuideView:
    """Sizes in pixels: the resized image's short side, and the windows that are cut from it.

    `window` is a window's length along the long side and equals `short` (windows are square);
    null takes the whole image, both sides rounded to the nearest multiple of `multiple`.
    """

    short: int
    window: int | None
    stride: int | None  # between window starts; null only where `window` is
    multiple: int

    def __post_init__(self) -> None:
        stride = 1 if self.stride is None else self.stride
        if min(self.short, self.multiple, stride) < 1 or self.short % self.multiple:
            raise SegmillError(
                f"view.short={self.short}, view.stride={self.stride}, view.multiple="
                f"{self.multiple}: sizes are above 0, and short is a multiple of view.multiple."
            )
        if self.window not in (None, self.short):
            raise SegmillError(
                f"view.window={self.window} and view.short={self.short}: windows are square, so "
                "give both the same value, or window=null for the whole image at once."
            )
        if (self.window is None) != (self.stride is None):
            raise SegmillError(
                f"view.window={self.window} and view.stride={self.stride}: give both, or null for "
                "both to take the whole image at once."
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image; windows are cut from it or it is the window."""
        short = min(height, width)
        unit = 1 if self.window else self.multiple
        rounded = [
            (2 * side * self.short + short * unit) // (2 * short * unit) * unit
            for side in (height, width)
        ]
        return rounded[0], rounded[1]

    def windows(
        self, image: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "N 3 h w"]:
        """All windows of the resized images, pixels in 0..255; an image's lie side by side."""
        size = self.size(image.shape[2], image.shape[3])
        resized = F.interpolate(
            image.float(), size, mode="bilinear", align_corners=False, antialias=True
        )
        starts, (height, width) = self._layout(size, image.device)
        rows = starts[:, :1] + torch.arange(height, device=image.device)
        columns = starts[:, 1:] + torch.arange(width, device=image.device)
        cut = resized[:, :, rows[:, :, None], columns[:, None, :]]  # (B, 3, windows, h, w)
        return cut.movedim(2, 1).flatten(0, 1)

    def sample(
        self, logits: Float[Tensor, "B K a b"], *, size: tuple[int, int], cell: int
    ) -> Float[Tensor, "N K h w"]:
        """Logits at the latent-cell centres of every window, whatever the logits' own stride.

        Those of a classifier, one pixel an image, are the same at every cell and stay one pixel.
        `size` is the resized image's (`size()`), `cell` the width of a latent cell in its pixels.
        """
        starts, (height, width) = self._layout(size, logits.device)
        if height % cell or width % cell:
            raise SegmillError(
                f"A window of {height} x {width} pixels has no whole number of latent cells of "
                f"{cell}. Set view.short and view.multiple to multiples of {cell}."
            )
        if logits.shape[2:] == (1, 1):
            return logits.float().repeat_interleave(len(starts), dim=0)
        down = torch.arange(height // cell, device=logits.device) * cell + cell / 2
        right = torch.arange(width // cell, device=logits.device) * cell + cell / 2
        # grid_sample counts from -1 at the image's first edge to 1 at its last.
        y = (starts[:, :1] + down) * (2 / size[0]) - 1
        x = (starts[:, 1:] + right) * (2 / size[1]) - 1
        count, rows, columns = len(starts), y.shape[1], x.shape[1]
        grid = torch.stack(
            [
                x[:, None, :].expand(count, rows, columns),
                y[:, :, None].expand(count, rows, columns),
            ],
            dim=-1,
        )
        sampled = F.grid_sample(
            logits.float(),
            grid.reshape(1, count * rows, columns, 2).expand(len(logits), -1, -1, -1),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return sampled.unflatten(2, (count, rows)).movedim(2, 1).flatten(0, 1)

    def _layout(
        self, size: tuple[int, int], device: torch.device
    ) -> tuple[Int64[Tensor, "N 2"], tuple[int, int]]:
        """(row, column) of every window's first pixel, and the height and width of a window."""
        if self.window is None or self.stride is None:
            return torch.zeros(1, 2, dtype=torch.int64, device=device), size
        along = torch.from_numpy(window_starts(max(size), self.window, self.stride))
        starts = torch.zeros(len(along), 2, dtype=torch.int64)
        starts[:, 1 if size[1] >= size[0] else 0] = along
        return starts.to(device), (self.window, self.window)
