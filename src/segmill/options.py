"""Groups and options of the configuration tree, read off its folders.

Standard library only: the help texts list options too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from segmill.commands.settings import BUILDS
from segmill.paths import CONFIGS

# A short option name is also looked for in these subfolders of its group.
# Classifiers are no models of `model=`, whose options are the variants of segmentation.
SUBFOLDERS = {
    "model": ("discriminative",),
    "model/discriminative": ("classifier",),
    "experiment": ("adapt", "ade20k", "cityscapes", "rgbd"),
}


def config_folders() -> tuple[Path, ...]:
    """The package's tree, then `configs/` of the current folder when that is another one."""
    own = Path.cwd() / "configs"
    if own.is_dir() and not own.samefile(CONFIGS):
        return (CONFIGS, own)
    return (CONFIGS,)


def groups() -> tuple[str, ...]:
    """Every folder with YAML files, as Hydra names it: `data`, `model`, `model/backbone`."""
    found = {
        file.parent.relative_to(folder).as_posix()
        for folder in config_folders()
        for file in folder.rglob("*.yaml")
        if file.parent != folder
    }
    parents = {name.split("/")[0] for name in found}
    return tuple(sorted(found | parents))


def options(group: str) -> dict[str, str]:
    """Short name -> option as Hydra wants it: `fcn_r50-d8` -> `discriminative/fcn_r50-d8`."""
    found: dict[str, str] = {}
    for subfolder in (*SUBFOLDERS.get(group, ()), ""):
        for folder in config_folders():
            for file in sorted((folder / group / subfolder).glob("*.yaml")):
                found[file.stem] = f"{subfolder}/{file.stem}" if subfolder else file.stem
    return found


def is_file(group: str, option: str) -> bool:
    """Whether the option is a whole path below the group's folder, as a defaults list writes it."""
    return any((folder / group / f"{option}.yaml").is_file() for folder in config_folders())


def fitting(command: str, group: str) -> dict[str, str]:
    """`options` of a group that `command` takes: others build what only other commands want."""
    return {name: each for name, each in options(group).items() if fits(command, group, each)}


def fits(command: str, group: str, option: str) -> bool:
    """Whether the option does not build what only other commands want."""
    wanted = BUILDS.get(command, {}).get(group)
    every = {kind for kinds in BUILDS.values() for kind in kinds.get(group, ())}
    return wanted is None or target_of(group, option) not in every.difference(wanted)


def target_of(group: str, option: str) -> str | None:
    """The `_target_` of an option's file, or of the options that it starts from."""
    files = (folder / group / f"{option}.yaml" for folder in config_folders())
    file = next((file for file in files if file.is_file()), None)
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("_target_:"):
            return line.partition(":")[2].partition("#")[0].strip()
    for line in lines:
        name = line.strip().removeprefix("- ").removesuffix("@_here_")
        if line.strip().startswith("- ") and name != "_self_" and ":" not in name:
            own = f"{group}/{option}".rpartition("/")[0]
            parent_group, _, parent = name.lstrip("/").rpartition("/")
            target = target_of(parent_group if name.startswith("/") else own, parent)
            if target is not None:
                return target
    return None


def suggestion(word: str, candidates: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean a or b?`, or nothing when no candidate is near."""
    near = difflib.get_close_matches(word, sorted(set(candidates)), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(f'{prefix}{each}' for each in near)}?" if near else ""
