"""Corrupted images as files: how one is made, and the manifest that says what each of them is.

The manifest is one JSON object a line; a later line about the same path replaces an earlier one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
import PIL
import scipy
from jaxtyping import UInt8

from segmill import __version__
from segmill.data.corruptions import corruption_seed
from segmill.data.decode import decode_image
from segmill.data.files import Archive, DataError, Folder, open_files
from segmill.data.frost_textures import load_frost
from segmill.data.task_folders import corrupted
from segmill.data.tasks import Task
from segmill.files import write_whole

MANIFEST = "manifest.jsonl"
MADE_BY = (
    f"segmill {__version__}, numpy {np.__version__}, opencv {cv2.__version__}, "
    f"pillow {PIL.__version__}, scipy {scipy.__version__}"
)
_JPEG, _PNG = (".jpg", ".jpeg"), (".png",)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the bytes of a file below the manifest's folder. No corruption: a copy."""

    path: str
    name: str
    corruption: str | None
    severity: int | None
    seed: int | None
    quality: int | None  # of JPEG
    textures: str | None  # of frost: the beginning of their sha256
    source: str  # sha256 of the file that it was made from


@dataclass(frozen=True)
class Entry:
    """A line of the manifest."""

    recipe: Recipe
    sha256: str
    bytes: int
    made_by: str

    def line(self) -> str:
        """As JSON."""
        made = {"sha256": self.sha256, "bytes": self.bytes, "made_by": self.made_by}
        return json.dumps({**asdict(self.recipe), **made}) + "\n"

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the file, in words."""
        path = folder / self.recipe.path
        if not path.is_file():
            return f"missing: {path}"
        content = path.read_bytes()
        if len(content) != self.bytes:
            return f"changed: {path} has {len(content)} bytes, the manifest says {self.bytes}"
        if sha256(content) != self.sha256:
            return f"changed: {path} has another sha256 than the manifest"
        return None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to make: `path` below `out` from `source` below `root`. No task: a plain copy."""

    root: str | Path
    source: str
    out: Path
    path: str
    name: str
    task: Task | None
    quality: int
    frost_dir: Path | None
    earlier: Entry | None  # what the manifest already says of the path


def make(job: Job) -> tuple[Entry, bool]:
    """Write the file, unless it is there as its entry says; returns whether it was written."""
    content = _files(job.root).read(job.source)
    recipe = _recipe(job, content)
    earlier = job.earlier
    if earlier is not None and earlier.recipe == recipe and earlier.damage(job.out) is None:
        return earlier, False
    path = job.out / job.path
    if job.task is not None:
        image = decode_image(content, _files(job.root).where(job.source))
        content = encoded(corrupted(image, job.name, job.task, job.frost_dir), path, job.quality)
    entry = Entry(recipe, sha256(content), len(content), MADE_BY)
    # A copy may be its own source, which somebody may be reading.
    written = job.task is not None or entry.damage(job.out) is not None
    if written:
        write_whole(path, content)
    return entry, written


def encoded(image: UInt8[np.ndarray, "H W 3"], path: Path, quality: int) -> bytes:
    """An RGB image in the format that the path's suffix names."""
    check_suffix(str(path))
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if _is_jpeg(str(path)) else []
    bgr = np.ascontiguousarray(image[..., ::-1])
    return cv2.imencode(path.suffix.lower(), bgr, options)[1].tobytes()


def check_suffix(pattern: str) -> None:
    """Refuse a format that is not written here."""
    if not pattern.lower().endswith((*_JPEG, *_PNG)):
        raise DataError(
            f"data.corrupted={pattern}: images are written as JPEG or PNG. End it in .jpg or .png."
        )


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Entries by path; none without a manifest. A last line that was cut off is left out."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    entries = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        entry = _entry(line, f"{path}, line {number}")
        entries[entry.recipe.path] = entry
    return entries


def open_manifest(folder: Path) -> TextIO:
    """The manifest, to add lines to; a last line that was cut off is removed."""
    path = folder / MANIFEST
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text or not text:
        write_whole(path, whole.encode())
    return path.open("a", encoding="utf-8", newline="\n")


def sha256(content: bytes) -> str:
    """Hex digits of the check sum."""
    return hashlib.sha256(content).hexdigest()


def _recipe(job: Job, content: bytes) -> Recipe:
    task, lossy = job.task, job.task is not None and _is_jpeg(job.path)
    return Recipe(
        path=job.path,
        name=job.name,
        corruption=None if task is None else task.corruption,
        severity=None if task is None else task.severity,
        seed=None if task is None else corruption_seed(job.name, task.corruption, task.severity),
        quality=job.quality if lossy else None,
        textures=_textures(job.frost_dir) if task and task.corruption == "frost" else None,
        source=sha256(content),
    )


def _entry(line: str, where: str) -> Entry:
    try:
        values: Mapping[str, Any] = json.loads(line)
        recipe = Recipe(**{field.name: values[field.name] for field in fields(Recipe)})
        return Entry(recipe, values["sha256"], values["bytes"], values["made_by"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} is no entry of a manifest ({error!r}). Remove the line: its file is then "
            "made again."
        ) from None


def _is_jpeg(path: str) -> bool:
    return path.lower().endswith(_JPEG)


@lru_cache(maxsize=1)
def _files(root: str | Path) -> Folder | Archive:
    return open_files(root)


@lru_cache(maxsize=1)
def _textures(frost_dir: Path | None) -> str:
    return sha256(b"".join(texture.tobytes() for texture in load_frost(frost_dir)))[:16]
