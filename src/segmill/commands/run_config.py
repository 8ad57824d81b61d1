"""What commands take from earlier runs: where one goes on, its configuration, its data.

Needs no framework: both runtimes go on from and score the runs of both.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from segmill.checkpoint.training_state import latest_state, require_training_state
from segmill.configuration import Invocation
from segmill.data.classes import Classes, HasClasses
from segmill.errors import SegmillError

STATE_SUFFIX = {"torch": ".ckpt", "jittor": ".pkl"}
# What may differ from the run as it was; keys with a dot are single values and may, too.
MAY_CHANGE = ("seed", "runtime")


def run_name(config: DictConfig) -> str:
    """`experiment.name`, else model, data and seed."""
    if config.experiment.name is not None:
        return str(config.experiment.name)
    return f"{config.model_name}_{config.data.name}_seed{config.seed}"


def resume_point(path: Path) -> Path:
    """The training state to go on from: the latest of a run folder, or a file itself."""
    found = latest_state(path) if path.is_dir() else path
    if found is None or not found.is_file():
        raise SegmillError(
            f"resume={path}: {path / 'last.ckpt' if path.is_dir() else path} does not exist. Give "
            f"a run folder that has a last.ckpt (torch) or last.pkl (Jittor), or start again "
            f"without resume."
        )
    # Reading it whole refuses a truncated file before anything is touched.
    require_training_state(found)
    return found


def require_steps_to_take(resume: Path, *, done: int, max_steps: int, runtime: str) -> None:
    """Refuse the finished run of the other runtime, whose best checkpoint this one lacks."""
    if done >= max_steps and resume.suffix != STATE_SUFFIX[runtime]:
        raise SegmillError(
            f"resume={resume}: all {max_steps} steps are done, on the other runtime. To train "
            "longer, set trainer.max_steps; for what that run still has to write, resume it there."
        )


def resumed_config(folder: Path, config: DictConfig, context: Invocation) -> DictConfig:
    """The run's own configuration; single values of the new command win, groups may not change."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise SegmillError(f"resume: {saved} is missing, so the run's configuration is unknown.")
    known = OmegaConf.load(saved)
    # Runs written before there were runtimes say none.
    changed = OmegaConf.create({"runtime": config.runtime})
    for override in context.overrides:
        key = _key(override)
        if key in {"resume", "output_dir"}:
            continue
        if key.startswith("~") or ("." not in key and key not in MAY_CHANGE):
            raise SegmillError(
                f"resume continues a run as it was; {override} would make it another one. "
                f"Leave it out, or start a new run with weights={folder}/model.safetensors."
            )
        OmegaConf.update(changed, key, OmegaConf.select(config, key))
    # The state has the weights; the file that they started from may be gone.
    merged = OmegaConf.merge(known, changed, {"weights": None})
    assert isinstance(merged, DictConfig)
    return merged


def config_of_run(config: DictConfig, context: Invocation) -> DictConfig:
    """Take the data of the run that is evaluated, unless data=... was given; values still win."""
    if config.run is None or any(item.startswith("data=") for item in context.overrides):
        return config
    path = Path(config.run)
    saved = (path if path.is_dir() else path.parent) / "config.yaml"
    if not saved.is_file():
        return config
    known = OmegaConf.load(saved)
    chosen = OmegaConf.create({"data": known.data})
    for override in context.overrides:
        key = _key(override)
        if key.startswith("~data"):
            raise SegmillError(
                f"{override} would take a part of the run's own data away. Set its keys to other "
                "values, or choose the data set by data=NAME."
            )
        if key.startswith("data."):
            OmegaConf.update(chosen, key, OmegaConf.select(config, key))
    merged = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    merged.data = chosen.data
    assert isinstance(merged, DictConfig)
    return merged


def _key(override: str) -> str:
    """`trainer.clip` of `++trainer.clip=1`; a `~`, which takes a key away, stays."""
    return override.partition("=")[0].lstrip("+")


def require_same_classes(classes: Classes, data: HasClasses) -> None:
    """Refuse to score a model on a data set of other classes."""
    if len(classes) != len(data.classes):
        raise SegmillError(
            f"The model has {len(classes)} classes, data={data.name} has "
            f"{len(data.classes)}: a score would compare different things. Choose the data set "
            f"that the model was trained for."
        )
