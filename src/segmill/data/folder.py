"""FolderDataset: every data set is patterns, splits and a label map in one YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt8

from segmill.data.classes import Classes
from segmill.data.decode import LabelFormat, decode_depth, decode_image, decode_label
from segmill.data.depth import depth_channel
from segmill.data.files import AbsentError, DataError, open_files
from segmill.data.labels import LabelMap
from segmill.data.sample import Sample

__all__ = ["DataError", "FolderDataset"]

Kind = Literal["image", "label", "depth"]


class FolderDataset:
    """Images with labels (and depth) in a folder or a zip archive, found by patterns.

    `image`, `label` and `depth` are paths below `data_root` with `{split}` and `{name}`; names may
    hold slashes. `splits[split]` may give `folder` (stands for {split}) and `list`, a text file
    with one sample per line: its name, or its image's path, which fits the pattern and which
    further paths (the label's) may follow. Without a list, every image that fits belongs to it.
    """

    def __init__(
        self,
        *,
        data_root: str | Path,
        image: str,
        label: str | None,
        depth: str | None,
        depth_range: tuple[float, float] | None,
        splits: Mapping[str, Mapping[str, str]],
        split: str,
        label_map: Mapping[int | str, int | str],
        label_format: LabelFormat,
        classes: Classes,
    ) -> None:
        self.split, self.classes = split, classes
        self.label_format: LabelFormat = label_format
        self.label_map = LabelMap(label_map, num_classes=len(classes))
        self.depth_range = depth_range
        if depth_range is not None and not depth_range[0] < depth_range[1]:
            raise DataError(f"data.depth_range is {depth_range}; it must be [nearest, farthest].")
        self.files = open_files(data_root)
        entry = _split_entry(splits, split)
        given: dict[Kind, str | None] = {"image": image, "label": label, "depth": depth}
        self.patterns = _patterns(given, entry.get("folder", split))
        self.list = entry.get("list")
        self.names = self._find_names()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode one sample; whatever is wrong with its files raises DataError."""
        image = self.read_image(index)
        if "depth" in self.patterns:
            depth = self.read_depth(index)
            self.require_same_size(index, "depth", depth, image)
            image = np.dstack([image, self.depth_channel(index, depth)])
        label = None
        if "label" in self.patterns:
            label = self.read_label(index)
            self.require_same_size(index, "label", label, image)
        return Sample(image, label, self.name(index))

    def name(self, index: int) -> str:
        """What stands for {name}."""
        return self.names[index].decode()

    def without_image(self) -> list[str]:
        """Names that have no image file; only a list can have such."""
        prefix, _, suffix = self.patterns["image"].partition("{name}")
        found = set(self.files.matching(prefix, suffix)) if self.list else None
        names = (name.decode() for name in self.names)
        return [name for name in names if found is not None and name not in found]

    def where(self, index: int, kind: Kind) -> str:
        """The file's full path, for messages."""
        return self.files.where(self.path(index, kind))

    def read_image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """The colour image alone."""
        return decode_image(self.read(index, "image"), self.where(index, "image"))

    def read_label(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """The label as class indices and 255."""
        where = self.where(index, "label")
        label = decode_label(self.read(index, "label"), where, self.label_format)
        return self.label_map(label, where)

    def read_depth(self, index: int) -> Shaped[np.ndarray, "H W"]:
        """Depth in the file's own unit."""
        return decode_depth(self.read(index, "depth"), self.where(index, "depth"))

    def require_same_size(
        self, index: int, kind: Kind, array: np.ndarray, image: np.ndarray
    ) -> None:
        """Label and depth are never resized to fit: a wrong size means a wrong pair."""
        if array.shape[:2] != image.shape[:2]:
            height, width = image.shape[:2]
            raise DataError(
                f"The {kind} {self.where(index, kind)} is {array.shape[1]} x {array.shape[0]}, but "
                f"its image {self.where(index, 'image')} is {width} x {height} (width x height). "
                f"Do they belong together? Check data.{kind}, or resize the {kind} by nearest."
            )

    def depth_channel(self, index: int, depth: np.ndarray) -> UInt8[np.ndarray, "H W"]:
        """Depth as the fourth image channel, by `depth_range`."""
        return depth_channel(depth, self.depth_range, self.where(index, "depth"))

    def path(self, index: int, kind: Kind) -> str:
        """The file's path below `data_root`."""
        return self.patterns[kind].replace("{name}", self.name(index))

    def read(self, index: int, kind: Kind) -> bytes:
        """The file's bytes."""
        try:
            return self.files.read(self.path(index, kind))
        except (FileNotFoundError, NotADirectoryError):
            listed = f", named in {self.files.where(self.list)}" if self.list else ""
            raise DataError(
                f"The {kind} {self.where(index, kind)} does not exist (sample "
                f"{self.name(index)!r} of split {self.split!r}{listed}). Add the file, correct "
                f"the pattern data.{kind}, or take the sample out."
            ) from None

    def _find_names(self) -> Shaped[np.ndarray, " N"]:
        """One array of bytes: a list of Python strings would be copied into every worker."""
        prefix, _, suffix = self.patterns["image"].partition("{name}")
        found = self._listed() if self.list else self.files.matching(prefix, suffix)
        if not found:
            source = f"the list {self.list}" if self.list else "no file fits the pattern"
            where = self.files.where(self.patterns["image"])
            raise AbsentError(
                f"The split {self.split!r} is empty: {source} ({where}). Correct data.image, "
                f"data.data_root or data.splits.{self.split}.",
                where=where,
            )
        return np.array([name.encode() for name in found])

    def _listed(self) -> list[str]:
        assert self.list is not None
        try:
            text = self.files.read(self.list).decode("utf-8-sig")
        except FileNotFoundError:
            raise DataError(
                f"The list {self.files.where(self.list)} of split {self.split!r} does not exist. "
                f"Correct data.splits.{self.split}.list, or leave it out to take every image."
            ) from None
        prefix, _, suffix = self.patterns["image"].partition("{name}")
        return [_named(line.strip(), prefix, suffix) for line in text.splitlines() if line.strip()]


def _named(line: str, prefix: str, suffix: str) -> str:
    """The {name} of a list's line: `RGB/7.jpg` and `RGB/7.jpg Label/7.png` are 7, like `7`."""
    for path in (line, line.split()[0]):
        long_enough = len(path) > len(prefix) + len(suffix) > 0
        if long_enough and path.startswith(prefix) and path.endswith(suffix):
            return path[len(prefix) : len(path) - len(suffix)]
    return line


def depth_keys(
    depth: str | None, depth_range: tuple[float, float] | None, channels: int
) -> dict[str, Any]:
    """Depth is read only where the model takes it: data.channels=3 leaves RGB of an RGB-D set."""
    if channels == 4 and depth is None:
        raise DataError(
            "data.channels=4 means colour and depth, but data.depth is null. "
            "Give the pattern of the depth files in data.depth, or set data.channels=3."
        )
    if channels == 3:
        return {"depth": None, "depth_range": None}
    return {"depth": depth, "depth_range": depth_range}


def _patterns(given: Mapping[Kind, str | None], folder: str) -> dict[Kind, str]:
    patterns: dict[Kind, str] = {}
    for kind, pattern in given.items():
        if pattern is None:
            continue
        if pattern.count("{name}") != 1:
            raise DataError(
                f"data.{kind} is {pattern!r}; it must contain {{name}} once, "
                "like images/{split}/{name}.jpg."
            )
        patterns[kind] = pattern.replace("{split}", folder)
    return patterns


def _split_entry(splits: Mapping[str, Mapping[str, str]], split: str) -> Mapping[str, str]:
    if split not in splits:
        raise DataError(
            f"The split {split!r} is not one of data.splits ({', '.join(splits)}). "
            "Add it there, or correct data.train_split, data.val_split or data.test_split."
        )
    unknown = set(splits[split]) - {"folder", "list"}
    if unknown:
        raise DataError(
            f"data.splits.{split} has the key {min(unknown)!r}; only `folder` and `list` are known."
        )
    return splits[split]
