"""The run folder: fixed once before launch, and everything that says what the run was."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segmill import __version__

HANDED_DOWN = "SEGMILL_RUN_FOLDER"  # Lightning starts the other ranks with the same command line
PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "timm",
    "transformers",
    "jittor",
    "numpy",
)


def new_run_folder(output_dir: str, name: str) -> Path:
    """Make `output_dir/name`, or `name-2`, `name-3`, ... when that exists; ranks share one."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and HANDED_DOWN in os.environ:
        return Path(os.environ[HANDED_DOWN])
    job = _external_job()
    if job is not None:
        folder = Path(output_dir) / f"{name}_{job}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    count = 1
    while True:
        folder = Path(output_dir) / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            count += 1
            continue
        os.environ[HANDED_DOWN] = str(folder)
        return folder


def _external_job() -> str | None:
    """The job's id where SLURM or torchrun started the ranks: none of them can hand a name down."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return os.environ["SLURM_JOB_ID"]
    return os.environ.get("TORCHELASTIC_RUN_ID")


def write_provenance(folder: Path, config: DictConfig, command: str) -> None:
    """`config.yaml` (resolved), `command.txt`, `environment.txt`, `commit.txt` and `git.patch`."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    (folder / "command.txt").write_text(command + "\n", encoding="utf-8")
    (folder / "environment.txt").write_text("\n".join(environment()) + "\n", encoding="utf-8")
    commit, patch = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    (folder / "commit.txt").write_text(commit or "not a git checkout\n", encoding="utf-8")
    if patch:
        (folder / "git.patch").write_text(patch, encoding="utf-8")


def environment() -> list[str]:
    """Versions and hardware, one fact a line."""
    lines = [f"segmill {__version__}", f"python {platform.python_version()} {platform.platform()}"]
    lines += [f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name)]
    lines += [f"cpu cores {os.cpu_count()}"]
    # A run on Jittor has no torch, and one on torch has it loaded.
    return lines + (_of_torch(sys.modules["torch"]) if "torch" in sys.modules else [])


def _of_torch(torch: Any) -> list[str]:
    lines = [f"torch threads {torch.get_num_threads()}"]
    if torch.cuda.is_available():
        lines += [
            f"gpu {index}: {torch.cuda.get_device_name(index)}"
            for index in range(torch.cuda.device_count())
        ]
        lines += [f"cuda {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"]
    return lines


def keep_older_metrics(folder: Path) -> None:
    """A resumed run starts a new metrics.csv; the one that is there gets a number."""
    metrics = folder / "metrics.csv"
    if metrics.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        metrics.rename(folder / f"metrics-{len(list(folder.glob('metrics-*.csv'))) + 1}.csv")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git(*arguments: str) -> str:
    """Output of git about the checkout that this code runs from; empty outside of one."""
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=where, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""
