"""ClassFolders: images in one folder for each class, in the layout of ImageNet and ImageNet-C.

Follows: torchvision's `ImageFolder`, which published numbers were measured with: classes are
         counted in the order of the folders' sorted names.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int64, Shaped

from segmill.data.decode import decode_photograph
from segmill.data.files import Archive, DataError, Folder, open_files
from segmill.data.labelled_image import LabelledImage
from segmill.data.task_folders import filled
from segmill.data.tasks import Task

SUFFIXES = frozenset((".jpeg", ".jpg", ".png"))
_SHOWN = 5  # names in a message


class ClassFolders:
    """The images of every task, below `data_root` (a folder or a zip file).

    `images` is the folder that holds the class folders, with {corruption} and {severity}. `obtain`
    says where the files come from; it is printed where they are missing.
    """

    def __init__(self, *, data_root: str | Path, images: str, obtain: str) -> None:
        self._root, self._pattern, self._obtain = Path(data_root), images, obtain
        self._files: Folder | Archive | None = None
        self._listed: dict[str, list[str]] = {}
        self._wanted: list[str] = []  # the folders of all tasks

    def require_tasks(self, tasks: Sequence[Task], *, on_the_fly: bool) -> None:
        """Refuse a pattern that gives several tasks the same files, or corrupts them twice."""
        self._wanted = [filled(self._pattern, task) for task in tasks]
        for field in ("corruption", "severity"):
            values = {getattr(task, field) for task in tasks}
            if on_the_fly and f"{{{field}}}" in self._pattern:
                raise DataError(
                    f"data.source.images={self._pattern} has images that are corrupted already, "
                    "and data.on_the_fly=true would corrupt them again. Set data.on_the_fly=false, "
                    "or name the folder of clean images (data=imagenet)."
                )
            if not on_the_fly and len(values) > 1 and f"{{{field}}}" not in self._pattern:
                raise DataError(
                    f"data.source.images={self._pattern} gives every {field} the same images, but "
                    f"there are {len(values)} ({', '.join(map(str, sorted(values)))}). Choose one, "
                    f"put {{{field}}} into the pattern, or corrupt clean images while they are "
                    "read: data.on_the_fly=true."
                )

    def class_names(self, task: Task) -> tuple[str, ...]:
        """The class folders of a task, sorted."""
        return tuple(sorted({path.partition("/")[0] for path in self._paths(task)}))

    def images(self, task: Task, names: Sequence[str]) -> "FolderImages":
        """The task's images; its class folders have to be `names`."""
        paths = self._paths(task)
        folder, found = filled(self._pattern, task), self.class_names(task)
        if found != tuple(names):
            raise DataError(self._other_classes(folder, set(names), set(found)))
        assert self._files is not None
        return FolderImages(self._files, folder, paths, names)

    def _paths(self, task: Task) -> list[str]:
        """CLASS/FILE of every image, sorted; tasks of the same folder list it once."""
        folder = filled(self._pattern, task)
        if folder not in self._listed:
            self._files = self._files or self._opened(folder)
            inside = self._files.matching(f"{folder}/", "")
            found = [path for path in inside if PurePosixPath(path).suffix.lower() in SUFFIXES]
            self._listed[folder] = self._in_class_folders(found, folder)
        return self._listed[folder]

    def _opened(self, folder: str) -> Folder | Archive:
        try:
            return open_files(self._root)
        except DataError:
            if self._root.is_file():
                what = f"data.data_root={self._root} is a file, and neither a folder nor a .zip"
                remedy = "Unpack it, and give the folder that it becomes."
            else:
                seen = "" if self._root.is_absolute() else f", seen from {Path.cwd()}"
                what = f"There is no folder {self._root}{seen}"
                remedy = self._remedy(folder)
            raise DataError(
                f"{what} (wanted: {self._root / folder}/CLASS/*.JPEG). {remedy}"
            ) from None

    def _in_class_folders(self, paths: list[str], folder: str) -> list[str]:
        where = self._root / folder
        if not paths:
            absent = "has no images" if where.is_dir() else "does not exist"
            raise DataError(
                f"The folder {where} {absent} (wanted: {where}/CLASS/*.JPEG, or .jpg or .png). "
                f"{self._remedy(folder)}"
            )
        wrong = next((path for path in paths if path.count("/") != 1), None)
        if wrong is not None:
            if "/" in wrong:
                remedy = "lies one folder too deep. Move the class folders up."
            else:
                remedy = (
                    "lies in no class folder. Sort the images into one folder for each class "
                    "(ImageNet's validation images come in one folder, with a list of their "
                    "classes beside it), or take it away."
                )
            raise DataError(
                f"{where / wrong}: images are wanted as {where}/CLASS/*.JPEG; this {remedy}"
            )
        return paths

    def _other_classes(self, folder: str, expected: set[str], found: set[str]) -> str:
        parts = [
            f"{verb} {len(names)} ({_some(names)})"
            for verb, names in (("lacks", expected - found), ("has besides", found - expected))
            if names
        ]
        return (
            f"The class folders of {self._root / folder} are not the {len(expected)} expected "
            f"ones: it {' and '.join(parts)}. A folder without images counts as absent. Classes "
            "are counted in the order of the names, so with another set every label would be "
            f"another class. {self._completed(found)} {self._obtain}"
        )

    def _completed(self, found: set[str]) -> str:
        return (
            "Complete the folder; or, where every task has just these, take a model of "
            f"{len(found)} classes: data.num_classes={len(found)}."
        )

    def _remedy(self, folder: str) -> str:
        root = self._root
        if any((root / each).is_dir() for each in self._wanted):
            return self._gaps(folder)
        near = [*root.parents[:3], *_folders_in(root)]
        better = next((each for each in near if (each / folder).is_dir()), None)
        if better is not None:
            return f"It is in {better}: set data.data_root={better}."
        there = next((each for each in (root / folder).parents if each.is_dir()), None)
        inside = "" if there is None else _some(each.name for each in _folders_in(there))
        if there is not None and root in there.parents:
            return (
                f"{there} holds {inside or 'no folders'}: choose among what is there "
                f"(data.corruptions, data.severities), or unpack the rest. {self._obtain}"
            )
        holds = f", which holds {inside}" if inside and there == root else ""
        return (
            f"{self._meant(folder)}Set data.data_root (now {root}{holds}) to the folder where "
            f"{self._pattern}/CLASS/*.JPEG begins. {self._obtain}"
        )

    def _gaps(self, folder: str) -> str:
        """The root is right: what belongs there besides."""
        absent = [each for each in self._wanted if not (self._root / each).is_dir()]
        if folder not in absent:
            return f"Unpack it again. {self._obtain}"
        return (
            f"{self._meant(folder)}data.data_root={self._root} has "
            f"{len(self._wanted) - len(absent)} of the {len(self._wanted)} folders of this run and "
            f"lacks {_some(absent)}. Unpack what is missing, or leave it out (data.corruptions, "
            f"data.severities). {self._obtain}"
        )

    def _meant(self, folder: str) -> str:
        """A folder whose name is nearly the wanted one's."""
        there = [each.name for each in _folders_in(self._root)]
        close = difflib.get_close_matches(folder.partition("/")[0], there, n=1, cutoff=0.8)
        return f"Did you mean {close[0]}? " if close else ""


class FolderImages:
    """The images of one folder of class folders."""

    def __init__(
        self, files: Folder | Archive, folder: str, paths: Sequence[str], names: Sequence[str]
    ) -> None:
        self._files, self._folder = files, folder
        # Arrays of bytes and numbers: lists of Python objects would be copied into every worker.
        self._paths: Shaped[np.ndarray, " N"] = np.array([path.encode() for path in paths])
        place = {name: index for index, name in enumerate(names)}
        labels = [place[path.partition("/")[0]] for path in paths]
        self._labels: Int64[np.ndarray, " N"] = np.array(labels, np.int64)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._paths)

    def __getitem__(self, index: int) -> LabelledImage:
        """Read and decode one image."""
        path = f"{self._folder}/{self._paths[index].decode()}"
        where = self._files.where(path)
        try:
            data = self._files.read(path)
        except OSError as error:
            raise DataError(f"The image {where} cannot be read ({error}).") from error
        return LabelledImage(
            decode_photograph(data, where), int(self._labels[index]), self.name(index)
        )

    def name(self, index: int) -> str:
        """CLASS/FILE without the suffix."""
        return self._paths[index].decode().rpartition(".")[0]

    @property
    def folder(self) -> str:
        """Where the images lie."""
        return self._files.where(self._folder)


def _folders_in(root: Path) -> list[Path]:
    return sorted(each for each in root.iterdir() if each.is_dir()) if root.is_dir() else []


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
