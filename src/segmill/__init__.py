"""segmill: train, evaluate, load and adapt semantic segmentation models.

Axis letters in every signature: B batch, C channels in, D channels inside, K classes, H W image
size, h w feature size, N tokens or windows, L levels, T prompt tokens. Lower case = downsampled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from segmill.segmenter import Segmenter

__version__ = "0.1.0"


def load(
    source: str | Path, *, weights: str | Path | None = None, num_classes: int | None = None
) -> Segmenter:
    """Open a run folder, a `model.safetensors`, or a variant's name with `weights` of any origin.

    Returns a `Segmenter`: `.network` is the plain nn.Module in eval mode on the CPU (normalised
    image (B, C, H, W) -> logits (B, K, h, w)), `.predict(image)` takes a file or an array.
    """
    from segmill.segmenter import open_segmenter  # keeps `import segmill` free of torch

    return open_segmenter(source, weights=weights, num_classes=num_classes)
