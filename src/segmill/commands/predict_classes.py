"""`segmill predict` with a classifier: the likeliest classes of every image, printed and as CSV."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from omegaconf import OmegaConf

from segmill.data.image_view import ImageView
from segmill.data.inputs import Input
from segmill.errors import SegmillError
from segmill.files import write_whole
from segmill.inference import predict_log_prob
from segmill.segmenter import Segmenter

log = logging.getLogger(__name__)

TOP = 5


def predict_classes(
    segmenter: Segmenter, inputs: Iterable[Input], folder: Path, *, view: ImageView | None
) -> int:
    """Write `predictions.csv`: image, then class and probability, the likeliest first."""
    places = range(1, min(TOP, len(segmenter.classes)) + 1)
    columns = [f"{what}_{place}" for place in places for what in ("class", "prob")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *columns])
    count = 0
    for source in inputs:
        if source.frame is not None:
            raise SegmillError(
                f"{source.name} is a video; a classifier predicts images only. Unpack it."
            )
        found = _likeliest(
            segmenter, source.image if view is None else view.classifier(source.image)
        )
        log.info("%s  %s", source.name, "  ".join(f"{name} {prob:.3f}" for name, prob in found))
        writer.writerow([source.name, *(f"{each}" for pair in found for each in pair)])
        count += 1
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "predictions.csv", text.getvalue().encode("utf-8"))
    return count


def view_of_run(run: Path) -> ImageView | None:
    """Images of another size than the training's are resized and cut to it; None: as they are.

    `run` is a run folder or its file; a variant's name has no training.
    """
    config = (run.parent if run.is_file() else run) / "config.yaml"
    if not config.is_file():
        return None
    height, width = OmegaConf.load(config).data.crop
    if height != width:
        return None
    return ImageView(size=height, crop_pct=1.0, interpolation="bicubic", guide_size=None)


def _likeliest(segmenter: Segmenter, image: UInt8[np.ndarray, "H W 3"]) -> list[tuple[str, float]]:
    with torch.inference_mode():
        log_prob = predict_log_prob(segmenter.network, segmenter.views(image), segmenter.protocol)
    prob, classes = log_prob[0].exp().topk(min(TOP, log_prob.shape[1]))
    names = segmenter.classes.names
    return [
        (names[each], value) for each, value in zip(classes.tolist(), prob.tolist(), strict=True)
    ]
