"""A miniature of ImageNet and ImageNet-C in their own layouts, and data sets that read it."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from segmill.configuration import build
from segmill.data.classification_data import ClassificationTaskData
from segmill.paths import CONFIGS
from segmill.protocol import Protocol

WNIDS = ("n01440764", "n01443537", "n02999410")
SIDE = 224
PROTOCOL = Protocol(
    name="whole",
    scale=None,
    multiple=None,
    mode="whole",
    window=None,
    stride=None,
    ratios=(1.0,),
    flip=False,
    pad_divisor=None,
    align_corners=False,
    ignore_index=255,
)


def write_classes(folder: Path, *, side: int = SIDE, images: int = 2) -> None:
    """Two images of each class; written in reverse, so that no order is there by chance."""
    for label, wnid in reversed([*enumerate(WNIDS)]):
        for number in reversed(range(images)):
            path = folder / wnid / f"ILSVRC2012_val_{images * label + number:08d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((side, side + 8 * (side != SIDE), 3), 40 * label + number, np.uint8)
            Image.fromarray(pixels).save(path, "JPEG", quality=95)


def write_imagenet_c(root: Path, *corruptions: str, severity: int = 5) -> None:
    for corruption in corruptions:
        write_classes(root / corruption / str(severity))


def classification(name: str, **changes: Any) -> ClassificationTaskData:
    """The data set of configs/data/NAME.yaml with some keys changed; dots go deeper."""
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")})
    config.data.workers = 0
    if name.startswith("imagenet"):
        config.data.num_classes = len(WNIDS)
        # ConvNeXt-L's, as segmill adapt fills them in.
        config.data.view.update({"crop_pct": 0.875, "interpolation": "bicubic"})
    for key, value in changes.items():
        OmegaConf.update(config.data, key.replace("__", "."), value, force_add=True)
    seed = config.data.pop("seed", 0)
    return build(config.data, protocol=PROTOCOL, seed=seed)


def imagenet_c(root: Path, **changes: Any) -> ClassificationTaskData:
    return classification(
        "imagenet_c", data_root=str(root), **{"corruptions": ["fog", "snow"], **changes}
    )


def batches(data: ClassificationTaskData, *which: int, **keys: Any) -> list[dict[str, Any]]:
    keys.setdefault("limit", None)
    return list(data.loader([data.tasks[index] for index in which], **keys))


def names(found: list[dict[str, Any]]) -> list[str]:
    return [name for batch in found for name in batch["name"]]
