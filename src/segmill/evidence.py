"""What is saved when a loss stops being finite, so that the cause can be found afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8


def write_evidence(
    folder: Path,
    *,
    step: int,
    terms: Mapping[str, float],
    names: Sequence[str],
    gradient_norms: Mapping[str, float],
    images: UInt8[np.ndarray, "B C H W"],
    labels: UInt8[np.ndarray, "B H W"],
) -> None:
    """Write `evidence.json` and one PNG per image and label of the batch that broke the loss."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "step": step,
        "losses": dict(terms),
        "images": list(names),
        "labels": [_label_counts(label) for label in labels],
        "gradient_norms": dict(sorted(gradient_norms.items(), key=lambda item: -item[1])),
    }
    (folder / "evidence.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        bgr = np.ascontiguousarray(image[:3].transpose(1, 2, 0)[..., ::-1])
        cv2.imwrite(str(folder / f"{index:02d}_image.png"), bgr)
        cv2.imwrite(str(folder / f"{index:02d}_label.png"), label)


def _label_counts(label: UInt8[np.ndarray, "H W"]) -> dict[str, int]:
    values, counts = np.unique(label, return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}
