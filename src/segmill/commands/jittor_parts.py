"""What the commands build on Jittor from the same configuration as on torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jittor as jt  # pyright: ignore[reportMissingImports]  # another environment's
from omegaconf import DictConfig

from segmill.checkpoint.choose import choose, file_of_run
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.report import Report
from segmill.checkpoint.write_safetensors import write_safetensors
from segmill.commands.trainer_settings import TrainerSettings
from segmill.configuration import build, plain
from segmill.errors import SegmillError
from segmill.jittor import random
from segmill.jittor.load import load_arrays, named_arrays, shapes_of
from segmill.jittor.models.discriminative import Discriminative
from segmill.model_file import Description, read_description
from segmill.twins import replaced, require_twins

# What this runtime does not have, and the value that asks for nothing.
ABSENT: Mapping[str, Any] = {
    "nodes": 1,
    "precision": "32-true",
    "accumulate": 1,
    "clip": None,
    "ema": None,
    "compile": False,
    "channels_last": False,
    "deterministic": False,
}


def built(node: DictConfig | Mapping[str, Any], **extra: Any) -> Any:
    """The node's object, of the twins of what it names; what has none is refused."""
    known = plain(node) if isinstance(node, DictConfig) else node
    require_twins(known)
    return build(replaced(known), **extra)


def checked_settings(node: DictConfig) -> TrainerSettings:
    """The trainer's settings; what Jittor would ignore is refused."""
    settings: TrainerSettings = build(node)
    for name, nothing in ABSENT.items():
        if getattr(settings, name) != nothing:
            raise SegmillError(
                f"trainer.{name}={getattr(settings, name)} has no effect with runtime=jittor. Set "
                f"it to {'null' if nothing is None else nothing}, or use runtime=torch."
            )
    if settings.devices not in (1, "auto"):
        raise SegmillError(
            f"trainer.devices={settings.devices}: runtime=jittor works in one process. Set it to "
            "1, or use runtime=torch."
        )
    return settings


def use_device(accelerator: str) -> str:
    """Compute on the GPU if Jittor was built for one (nvcc_path) and `accelerator` agrees."""
    if accelerator == "gpu" and not jt.has_cuda:
        raise SegmillError(
            "accelerator=gpu, but this Jittor was built without CUDA. Set the environment variable "
            "nvcc_path to the CUDA compiler before it is built, or use accelerator=cpu."
        )
    jt.flags.use_cuda = int(bool(jt.has_cuda) and accelerator != "cpu")
    return "GPU" if jt.flags.use_cuda else "CPU"


def build_model(node: DictConfig | Mapping[str, Any], *, seed: int) -> Discriminative:
    """The model with weights drawn from `seed`."""
    random.seed(seed)
    return built(node)


def load_weights(
    model: Discriminative, source: str, *, may_miss: Sequence[str], may_leave: Sequence[str]
) -> Report:
    """A checkpoint of any origin, or a run folder, into the network."""
    path = Path(source)
    if not path.exists():
        raise SegmillError(
            f"weights={source} is no file and no run folder here (seen from {Path.cwd()}). "
            "runtime=jittor takes nothing from the hub or timm: name a file."
        )
    arrays = read_checkpoint(file_of_run(path) if path.is_dir() else path)
    network = model.network
    _, rules = choose(arrays, shapes_of(network), network.key_rules())
    return load_arrays(network, arrays, rules=rules, may_miss=may_miss, may_leave=may_leave)


def open_model(source: str) -> tuple[Discriminative, Description]:
    """A run folder or its model.safetensors, whichever runtime wrote it."""
    path = Path(source)
    if path.is_dir():
        path = file_of_run(path)
    if not path.is_file():
        raise SegmillError(
            f"run={source} does not exist. Give a run folder or a model.safetensors."
        )
    found = read_description(path)
    model = build_model(found.config, seed=0)
    load_arrays(model.network, read_checkpoint(path), rules=())
    return model, found


def save_model(path: Path, model: Discriminative, description: Description) -> None:
    """Write `model.safetensors`, which both runtimes open."""
    write_safetensors(path, named_arrays(model.network), description.metadata())
