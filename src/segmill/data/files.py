"""Where the bytes of a data set lie: a folder, or a zip archive that is read without unpacking."""

import os
import zipfile
import zlib
from pathlib import Path

from segmill.errors import SegmillError


class DataError(SegmillError):
    """A data set that cannot be used as it is: names the file, the value found and the remedy."""


class AbsentError(DataError):
    """Nothing lies at `where`, a path or a pattern with {name}."""

    def __init__(self, message: str, *, where: str) -> None:
        super().__init__(message)
        self.where = where


def open_files(data_root: str | Path) -> "Folder | Archive":
    """Open a folder, an archive `x.zip`, or a folder inside of it, `x.zip/inner`."""
    root = Path(data_root)
    if root.is_dir():
        return Folder(root)
    for archive in (root, *root.parents):
        if archive.suffix == ".zip" and archive.is_file():
            return Archive(archive, root.relative_to(archive).as_posix())
    raise AbsentError(
        f"The data folder {root} does not exist. Set data.data_root to the folder (or .zip file) "
        "that holds the images, or the environment variable SEGMILL_DATA to the folder above it.",
        where=str(root),
    )


class Folder:
    """A directory; links are followed. Paths are relative to it, with forward slashes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str) -> bytes:
        """The whole file; raises FileNotFoundError."""
        return (self._root / path).read_bytes()

    def matching(self, prefix: str, suffix: str) -> list[str]:
        """What stands between `prefix` and `suffix` in such paths, sorted; may hold slashes."""
        found = []
        for folder, _, files in os.walk(self._root / prefix.rpartition("/")[0], followlinks=True):
            inner = Path(folder).relative_to(self._root).as_posix()
            found += [file if inner == "." else f"{inner}/{file}" for file in files]
        return _between(found, prefix, suffix)

    def where(self, path: str) -> str:
        """The path below the root."""
        return str(self._root / path)


class Archive:
    """A zip file; every process opens its own handle, as forks would share the file position."""

    def __init__(self, archive: Path, inner: str) -> None:
        self._archive = archive
        self._inner = "" if inner == "." else f"{inner}/"
        self._handle: zipfile.ZipFile | None = None
        self._process = -1

    def read(self, path: str) -> bytes:
        """Unpack one member in memory; its check sum is verified."""
        try:
            return self._open().read(self._inner + path)
        except KeyError:
            raise FileNotFoundError(self.where(path)) from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise DataError(
                f"{self.where(path)} is damaged ({error}). Copy or download the archive again."
            ) from error

    def matching(self, prefix: str, suffix: str) -> list[str]:
        """The same from the archive's table of contents."""
        return _between(self._open().namelist(), self._inner + prefix, suffix)

    def where(self, path: str) -> str:
        """The archive's path followed by the member's."""
        return f"{self._archive}/{self._inner}{path}"

    def _open(self) -> zipfile.ZipFile:
        if self._handle is None or self._process != os.getpid():
            try:
                self._handle = zipfile.ZipFile(self._archive)
            except zipfile.BadZipFile as error:
                raise DataError(
                    f"{self._archive} is damaged ({error}). Copy or download the archive again."
                ) from error
            self._process = os.getpid()
        return self._handle


def _between(paths: list[str], prefix: str, suffix: str) -> list[str]:
    shortest = len(prefix) + len(suffix) + 1
    return sorted(
        path[len(prefix) : len(path) - len(suffix)]
        for path in paths
        if len(path) >= shortest
        and path.startswith(prefix)
        and path.endswith(suffix)
        # "._x.jpg" is what some systems write beside x.jpg into archives and network folders.
        and not path.rpartition("/")[2].startswith(".")
    )
