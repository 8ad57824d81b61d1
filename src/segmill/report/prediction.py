"""Predictions as files: overlay and index map of every image or frame, and one legend.

legend.png            colour, index and name of every class
classes.csv           the same as text, as data.classes reads it
overlay/NAME.jpg      the image with its classes in colour
index/NAME.png        class indices, 8-bit grey, as FolderDataset reads labels; grey rather than
                      a palette PNG, because OpenCV would read that as colours
overlay/CLIP.mp4      for a video: one film, and index/CLIP/000000.png ... for its frames
"""

import csv
import io
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from jaxtyping import UInt8

from segmill.data.classes import Classes
from segmill.data.inputs import Input
from segmill.errors import SegmillError
from segmill.files import write_whole
from segmill.report.overlay import legend, overlay

FPS = 25.0  # of a film whose source does not say


class PredictionWriter:
    """Writes predictions below one folder; use it in a `with` block, which finishes films."""

    def __init__(self, folder: str | Path, *, classes: Classes, alpha: float) -> None:
        self._folder = Path(folder)
        self._classes = classes
        self._alpha = alpha
        self._films: dict[str, _Film] = {}
        write_whole(self._folder / "legend.png", _png(legend(classes.names, classes.palette)))
        write_whole(self._folder / "classes.csv", _csv(classes))

    def write(self, source: Input, pred: UInt8[np.ndarray, "H W"]) -> Path:
        """Write one image or frame; returns the overlay's path (of a film: when it is finished)."""
        picture = overlay(source.image, pred, self._classes.palette, alpha=self._alpha)
        if source.frame is None:
            write_whole(self._path("index", f"{source.name}.png"), _png(pred))
            path = self._path("overlay", f"{source.name}.jpg")
            write_whole(path, _jpeg(picture))
            return path
        write_whole(self._path("index", f"{source.name}/{source.frame:06d}.png"), _png(pred))
        path = self._path("overlay", f"{source.name}.mp4")
        if source.name not in self._films:
            self._films[source.name] = _Film(path, picture.shape[:2], source.fps or FPS)
        self._films[source.name].add(picture)
        return path

    def close(self) -> None:
        """Finish the films."""
        for film in self._films.values():
            film.finish()
        self._films.clear()

    def __enter__(self) -> "PredictionWriter":
        """Nothing to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Films are finished after an error too: what was predicted until then can be watched."""
        self.close()

    def _path(self, kind: str, name: str) -> Path:
        return self._folder / kind / name


class _Film:
    """An MP4 that takes its name when it is finished."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float) -> None:
        self._path = path
        self._scratch = path.with_name(f".{path.stem}-unfinished.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._scratch), code, fps, size[::-1])
        if not self._writer.isOpened():
            raise SegmillError(
                f"OpenCV cannot write {path} (MPEG-4, {size[1]} x {size[0]}, {fps} frames/s). "
                "Unpack the video into a folder of images and predict on that."
            )

    def add(self, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Append a frame (RGB)."""
        self._writer.write(np.ascontiguousarray(picture[..., ::-1]))

    def finish(self) -> None:
        """Close the file and give it its name."""
        self._writer.release()
        self._scratch.replace(self._path)


def _png(picture: UInt8[np.ndarray, "H W *C"]) -> bytes:
    return cv2.imencode(".png", _bgr(picture))[1].tobytes()


def _jpeg(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    return cv2.imencode(".jpg", _bgr(picture), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def _bgr(picture: UInt8[np.ndarray, "H W *C"]) -> UInt8[np.ndarray, "H W *C"]:
    return np.ascontiguousarray(picture[..., ::-1]) if picture.ndim == 3 else picture


def _csv(classes: Classes) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(("name", "red", "green", "blue", "prompt"))
    for name, colour, prompt in zip(classes.names, classes.palette, classes.prompts, strict=True):
        table.writerow((name, *(int(part) for part in colour), prompt))
    return text.getvalue().encode("utf-8")
