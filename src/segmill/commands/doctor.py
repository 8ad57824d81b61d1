"""`segmill doctor`: does this machine have what segmill needs, and what to do where it has not."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from segmill.commands.accounts import has_wandb_key
from segmill.errors import SegmillError
from segmill.options import config_folders

GIB = 2**30
HUB = "huggingface.co"
# torch 2.14 belongs to torchvision 0.29: the minor versions differ by this much.
TORCHVISION_OFFSET = 15
SHOWN = ("torch", "lightning", "timm", "transformers", "hydra-core")
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    status: Literal["ok", "warn", "fail"]
    subject: str
    found: str
    remedy: str = ""


def run() -> None:
    """Print the table; raise SegmillError when something that segmill needs is missing."""
    findings = list(examine())
    table = Table()
    for title in ("", "what", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for each in findings:
        table.add_row(
            f"[{STYLES[each.status]}]{each.status}", each.subject, each.found, each.remedy
        )
    console = Console()
    console.print(table)
    failed = [each.subject for each in findings if each.status == "fail"]
    if failed:
        raise SegmillError(
            f"{', '.join(failed)}: not usable as it is; see the last column. Then: segmill doctor"
        )
    console.print("Next: segmill demo")


def examine() -> Iterator[Finding]:
    """Every check, in the order of the table."""
    yield python_version()
    yield from packages()
    if _installed("torch") is not None:
        yield torchvision_build()
        yield from gpus()
        yield threads()
    yield from disk()
    yield data_sets()
    yield hub()
    yield wandb_key()


def python_version() -> Finding:
    """3.11 to 3.13."""
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("ok", "Python", found)
    return Finding("fail", "Python", found, "make test PYTHON=python3.12, or another of 3.11-3.13")


def packages() -> Iterator[Finding]:
    """Each requirement of segmill itself and of its extra `torch` against what is installed."""
    good = []
    for text in metadata.requires("segmill") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "torch"}):
            continue
        finding = package(requirement)
        if finding.status == "ok":
            good.append(finding.found)
        else:
            yield finding
    shown = [each for each in good if each.split()[0] in SHOWN]
    yield Finding("ok", "packages", f"{len(good)} in range: {', '.join(shown)}")


def package(requirement: Requirement) -> Finding:
    """One package; the two poisoned releases of lightning are named."""
    name, version = requirement.name, _installed(requirement.name)
    if version is None:
        remedy = 'pip install "segmill[torch]", or make setup'
        return Finding("fail", name, "not installed", remedy)
    if name == "lightning" and version in {"2.6.2", "2.6.3"}:
        remedy = "malicious upload: remove it now, change the keys that this machine holds"
        return Finding("fail", name, version, remedy)
    if requirement.specifier.contains(Version(version).public, prereleases=True):
        return Finding("ok", name, f"{name} {version}")
    return Finding("warn", name, version, f"tested with {requirement.specifier}")


def torchvision_build() -> Finding:
    """torchvision's operators load only beside the torch that they were built for."""
    version, found = metadata.version("torch"), _installed("torchvision")
    if found is None:
        return Finding("fail", "torchvision", "not installed", "install the one built for torch")
    try:
        import torch
        from torchvision.ops import nms  # a compiled operator: the wrong build fails here

        operators = len(nms(torch.rand(1, 4), torch.rand(1), 0.5)) == 1
    except (ImportError, RuntimeError, OSError, NotImplementedError):
        operators = False
    wanted = f"0.{Version(version).minor + TORCHVISION_OFFSET}"
    if operators and found.startswith(f"{wanted}."):
        return Finding("ok", "torch + torchvision", f"{version} + {found}")
    remedy = f"torch {version} needs torchvision {wanted}.* of the same build (CUDA or CPU)"
    return Finding("fail", "torch + torchvision", f"{version} + {found}", remedy)


def gpus() -> Iterator[Finding]:
    """Every GPU with its memory."""
    import torch  # the other checks answer without it

    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        )
        remedy = "fine for the demo and for prediction; training wants a GPU (driver installed?)"
        yield Finding("warn", "GPU", f"none usable; {built}", remedy)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        )
        yield Finding("ok", f"GPU {index}", found)


def threads() -> Finding:
    """More threads than cores only fight each other."""
    import torch

    linux = sys.platform == "linux"  # elsewhere a process may use every core
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    used = torch.get_num_threads()
    found = f"{used} torch threads, {cores} cores"
    if used <= cores:
        return Finding("ok", "threads", found)
    return Finding("warn", "threads", found, f"export OMP_NUM_THREADS={cores}")


def disk() -> Iterator[Finding]:
    """Room for run folders, and shared memory for the loader's workers."""
    for path, need, subject in ((Path.cwd(), 5, "disk"), (Path("/dev/shm"), 1, "shared memory")):
        if not path.is_dir():
            continue
        free = shutil.disk_usage(path).free / GIB
        found = f"{free:.1f} GiB free in {path}"
        remedy = "" if free >= need else f"under {need} GiB: free some, or data.workers=0"
        yield Finding("ok" if free >= need else "warn", subject, found, remedy)


def data_sets() -> Finding:
    """Which data sets lie where their YAML says."""
    present, absent = [], []
    for folder in config_folders():
        for file in sorted((folder / "data").glob("*.yaml")):
            node = OmegaConf.load(file)
            missing = OmegaConf.is_missing(node, "data_root")
            # The digits have no folder: a package brings them along.
            root = None if missing else OmegaConf.select(node, "data_root")
            here = not missing and (root is None or Path(root).exists())
            (present if here else absent).append(file.stem)
    found = f"found: {', '.join(present) or 'none'}; not here: {', '.join(absent) or 'none'}"
    remedy = "" if present else "say where: data.data_root=DIR; data=scenes makes its own"
    return Finding("ok" if present else "warn", "data sets", found, remedy)


def hub() -> Finding:
    """Whether `weights=owner/name` can download."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        remedy = "weights=owner/name reads the cache only (HF_HUB_OFFLINE is set)"
        return Finding("warn", "model hub", "offline by setting", remedy)
    try:
        socket.create_connection((HUB, 443), timeout=2).close()
    except OSError:
        remedy = "copy files here and use weights=FILE, or fill the hub's cache elsewhere"
        return Finding("warn", "model hub", f"{HUB} is not reachable", remedy)
    return Finding("ok", "model hub", f"{HUB} answers")


def wandb_key() -> Finding:
    """W&B never blocks a run; without a key it writes offline."""
    if has_wandb_key():
        return Finding("ok", "W&B", "a key is there; logging=wandb is online")
    return Finding("ok", "W&B", "no key; logging=wandb writes offline, send later: wandb sync")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
