"""Look at a folder of images and labels; guess the patterns, splits and values of its YAML."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from segmill.data.decode import LabelFormat, decode_depth, decode_label, is_palette
from segmill.data.files import DataError

Kind = Literal["image", "label", "depth"]

_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FOLDER_WORDS: tuple[tuple[Kind, str], ...] = (
    ("depth", "depth"),
    ("label", "label|mask|annot|segmentation|(^|[/_])gt"),
)
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_LOOKED_AT = 50
_REMEDY = "Copy configs/data/folder.yaml and write the patterns; see docs/add_a_dataset.md."


@dataclass(frozen=True)
class Guess:
    """What the folder seems to be; keys as in a data YAML."""

    image: str
    label: str
    depth: str | None
    depth_range: tuple[int, int] | None
    splits: dict[str, dict[str, str]]
    label_format: LabelFormat
    values: tuple[int, ...]  # that occur in the labels looked at, 255 left out


def guess(root: Path) -> Guess:
    """Patterns that pair most files; the labels of the first samples are decoded."""
    if not root.is_dir():
        raise DataError(f"The folder {root} does not exist. Name the folder with the images.")
    files = sorted(
        path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in _ENDINGS
    )
    patterns: dict[Kind, str] = {}
    for kind in ("image", "label", "depth"):
        found = Counter(_pattern(path) for path in files if _kind(path) == kind)
        if found:
            patterns[kind] = found.most_common(1)[0][0]
    for kind in ("image", "label"):
        if kind not in patterns:
            raise DataError(
                f"{root} has {len(files)} pictures, but no {kind}s were recognised: folders of "
                f"labels are called labels, masks, annotations or gt. {_REMEDY}"
            )
    splits = _splits(root, files, patterns["image"], patterns["label"])
    labels = _some(root, patterns["label"], splits)
    if not labels:
        raise DataError(
            f"No label fits to an image: {patterns['label']} against {patterns['image']} in "
            f"{root}. Both need the same {{name}}. {_REMEDY}"
        )
    label_format: LabelFormat = "palette" if is_palette(labels[0].read_bytes()) else "index"
    decoded = [decode_label(path.read_bytes(), str(path), label_format) for path in labels]
    values = {int(value) for label in decoded for value in np.unique(label)} - {255}
    depth = patterns.get("depth")
    return Guess(
        image=patterns["image"],
        label=patterns["label"],
        depth=depth,
        depth_range=None if depth is None else _depth_range(_some(root, depth, splits)),
        splits=splits,
        label_format=label_format,
        values=tuple(sorted(values)),
    )


def _kind(path: Path) -> Kind:
    folders = "/".join(path.parts[:-1]).lower()
    for kind, words in _FOLDER_WORDS:
        if re.search(words, folders):
            return kind
    return "image"


def _pattern(path: Path) -> str:
    """`images/training/a.jpg` -> `images/{split}/{name}.jpg`."""
    folders = ["{split}" if _split_of(part) else part for part in path.parts[:-1]]
    return "/".join([*folders, "{name}" + path.suffix])


def _split_of(folder: str) -> str | None:
    return next((split for split, words in _SPLITS.items() if folder.lower() in words), None)


def _splits(root: Path, files: list[Path], image: str, label: str) -> dict[str, dict[str, str]]:
    if "{split}" in image:
        position = image.split("/").index("{split}")
        folders = {path.parts[position] for path in files if _pattern(path) == image}
        found = {str(_split_of(folder)): {"folder": folder} for folder in sorted(folders)}
    else:
        found = {
            split: {"list": path.relative_to(root).as_posix()}
            for split in _SPLITS
            for path in sorted(root.rglob(f"{split}.txt"), reverse=True)
            if _names_a_label(path, root, label)
        }
    if "train" not in found or len(found) < 2:
        raise DataError(
            f"{root} shows no split into training and validation: neither folders train/ and val/ "
            f"nor lists train.txt and val.txt. Make one of them. {_REMEDY}"
        )
    return {split: found[split] for split in _SPLITS if split in found}


def _names_a_label(names: Path, root: Path, label: str) -> bool:
    """Tells the list of segmentation from those of other tasks (PASCAL VOC has several)."""
    first = names.read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0].strip()
    return (root / label.replace("{name}", first)).is_file()


def _some(root: Path, pattern: str, splits: dict[str, dict[str, str]]) -> list[Path]:
    """The first files that fit, of all splits."""
    found: list[Path] = []
    for entry in splits.values():
        glob = pattern.replace("{split}", entry.get("folder", "")).replace("{name}", "*")
        found += sorted(root.glob(glob))[:_LOOKED_AT]
    return found


def _depth_range(paths: list[Path]) -> tuple[int, int] | None:
    """From 0 to the largest value seen; None for 8-bit files, which need no range."""
    depths = [decode_depth(path.read_bytes(), str(path)) for path in paths]
    largest = max((int(depth.max()) for depth in depths), default=0)
    return (0, largest) if largest > 255 else None
