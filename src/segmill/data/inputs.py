"""What `segmill predict` is pointed at: an image, a folder, a glob pattern or a video."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from segmill.data.decode import decode_depth, decode_image
from segmill.data.depth import depth_channel
from segmill.data.files import DataError

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
VIDEOS = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"))


@dataclass(frozen=True)
class Source:
    """A file to predict on, and the name of what is written for it (may hold slashes)."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """By its suffix."""
        return self.path.suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Input:
    """One image, RGB or RGB and depth. `frame` and `fps` are None unless it is from a video."""

    name: str
    image: UInt8[np.ndarray, "H W C"]
    frame: int | None
    fps: float | None


def find_inputs(paths: Sequence[str]) -> list[Source]:
    """List the files behind `paths`, in order. Raises DataError before anything is decoded.

    A file or a glob match is named by its stem, a file in a folder by its path below the folder.
    """
    sources = [source for path in paths for source in _find(path)]
    if not sources:
        raise DataError("There is nothing to predict on: give images, folders, globs or videos.")
    first: dict[str, Source] = {}
    for source in sources:
        other = first.setdefault(source.name, source)
        if other is not source:
            raise DataError(
                f"{other.path} and {source.path} would both be written as {source.name!r}. "
                "Predict on them one after the other, or rename one."
            )
    return sources


def iter_inputs(
    paths: Sequence[str],
    *,
    depth: str | Path | None,
    depth_range: tuple[float, float] | None,
) -> Iterator[Input]:
    """Decode the inputs one at a time.

    `depth` is a depth file (for a single image) or a folder that holds NAME.png for every image;
    `depth_range` says which of its values become 0 and 255; None: they are 8-bit as the model was
    trained on them.
    """
    sources = find_inputs(paths)
    if depth is not None:
        _require_depth(sources, Path(depth))
    for source in sources:
        if source.is_video:
            yield from _frames(source)
            continue
        image = decode_image(source.path.read_bytes(), str(source.path))
        if depth is not None:
            channel = _read_depth(_depth_path(source, Path(depth)), image, depth_range)
            image = np.dstack([image, channel])
        yield Input(source.name, image, None, None)


def _find(path: str) -> list[Source]:
    given = Path(path)
    if given.is_file():
        return [Source(given, given.stem)]
    if given.is_dir():
        found = sorted(file for file in given.rglob("*") if _is_input(file))
        if not found:
            raise DataError(
                f"The folder {given} holds no image or video (looked for "
                f"{' '.join(sorted(IMAGES | VIDEOS))}, in subfolders too)."
            )
        return [Source(file, file.relative_to(given).with_suffix("").as_posix()) for file in found]
    matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]  # noqa: PTH207
    if found := [Source(match, match.stem) for match in matches if match.is_file()]:
        return found
    looked = "matches no file" if glob.has_magic(path) else "does not exist"
    raise DataError(f"{path} {looked}. Give an image, a folder, a glob pattern or a video.")


def _is_input(file: Path) -> bool:
    # "._x.jpg" is what some systems write beside x.jpg.
    return file.suffix.lower() in IMAGES | VIDEOS and not file.name.startswith(".")


def _frames(source: Source) -> Iterator[Input]:
    capture = cv2.VideoCapture(str(source.path))
    try:
        fps = capture.get(cv2.CAP_PROP_FPS)
        index = 0
        while capture.isOpened():
            decoded, frame = capture.read()
            if not decoded:
                break
            rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            yield Input(source.name, rgb.astype(np.uint8, copy=False), index, fps)
            index += 1
    finally:
        capture.release()
    if index == 0:
        raise DataError(
            f"The video {source.path} gives no frame: it is damaged, or OpenCV lacks its codec. "
            "Convert it to H.264 in .mp4, or unpack it into a folder of images."
        )


def _require_depth(sources: Sequence[Source], depth: Path) -> None:
    """Find missing depth files before the first prediction."""
    for source in sources:
        if source.is_video:
            raise DataError(
                f"{source.path} is a video; depth goes with images only. Unpack it into a folder."
            )
        if depth.is_file() and len(sources) > 1:
            raise DataError(
                f"{depth} is one depth file for {len(sources)} images; give the folder of them."
            )
        if not _depth_path(source, depth).is_file():
            raise DataError(
                f"The depth of {source.path} is missing: {_depth_path(source, depth)} does not "
                "exist. Depth files are named like their images, with the suffix .png."
            )


def _depth_path(source: Source, depth: Path) -> Path:
    return depth if depth.is_file() else depth / f"{source.name}.png"


def _read_depth(
    path: Path, image: UInt8[np.ndarray, "H W C"], depth_range: tuple[float, float] | None
) -> UInt8[np.ndarray, "H W"]:
    depth = decode_depth(path.read_bytes(), str(path))
    if depth.shape != image.shape[:2]:
        raise DataError(
            f"The depth {path} is {depth.shape[1]} x {depth.shape[0]}, but its image is "
            f"{image.shape[1]} x {image.shape[0]} (width x height). Do they belong together?"
        )
    return depth_channel(depth, depth_range, str(path))
