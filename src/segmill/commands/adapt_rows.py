"""The rows of a comparison: which methods, each with the whole configuration it runs under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from segmill.configuration import Invocation, build, compose
from segmill.errors import SegmillError
from segmill.options import options, suggestion
from segmill.tta.results import SOURCE

UNTRAINED = (SOURCE, "bn")  # update no weights
# What may differ between rows: they share the data, the models and their weights.
OF_A_ROW = ("tta.", "optimizer.", "model.update.", "model.loss.")


@dataclass(frozen=True, kw_only=True)
class TTASettings:
    """The keys under `tta` but the method itself."""

    forward_mode: Literal["tta", "discriminative_only"]
    continual: bool
    mixed: bool
    predict: Literal["before", "after"]
    batch_statistics: bool
    max_epochs: int

    def __post_init__(self) -> None:
        if self.max_epochs < 1:
            raise SegmillError(f"tta.max_epochs={self.max_epochs} should be 1 or more.")
        if self.mixed and self.continual:
            raise SegmillError(
                "tta.mixed=true is one stream of all tasks, so there is nothing that "
                "tta.continual=true could carry on. Choose one of them."
            )


@dataclass(frozen=True)
class Row:
    """One method of the comparison."""

    name: str
    config: DictConfig

    @property
    def tta(self) -> TTASettings:
        """The settings of the harness for this row."""
        node = {key: value for key, value in self.config.tta.items() if key != "method"}
        return build({"_target_": f"{__name__}.TTASettings", **node})


def rows_of(config: DictConfig, context: Invocation) -> dict[str, Row]:
    """The methods to compare, `source` first; every row is composed and checked before any runs."""
    if config.tta.forward_mode == "discriminative_only":
        wanted: dict[str, dict[str, Any]] = {SOURCE: {"tta": SOURCE}}
    else:
        wanted = _wanted(config)
    rows = {}
    for name, settings in wanted.items():
        kept = [each for each in context.overrides if _goes_to_row(each, settings["tta"])]
        own = [f"{key}={value}" for key, value in settings.items()]
        rows[name] = Row(name, compose("adapt", [*kept, *own]))
        _ = rows[name].tta  # wrong values are refused now
    return rows


def saved_rows(folder: Path, context: Invocation) -> tuple[DictConfig, dict[str, Row]]:
    """The configuration and the rows of an interrupted run."""
    others = [each for each in context.overrides if not each.startswith("resume=")]
    if others:
        raise SegmillError(
            f"resume goes on with a comparison as it was; {', '.join(others)} would make it "
            "another one. Leave it out, or start a new run."
        )
    config = _load(folder / "config.yaml")
    names = [str(name) for name in config.methods]
    return config, {name: Row(name, _load(folder / name / "config.yaml")) for name in names}


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        raise SegmillError(f"resume: {path} is missing. Give the run folder of a segmill adapt.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def _wanted(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Row name -> its settings; a list of names is a row for each."""
    methods = config.methods
    if methods is None:
        methods = ListConfig([config.method_name])
    if isinstance(methods, ListConfig):
        found = {str(name): {"tta": str(name)} for name in methods}
    elif isinstance(methods, DictConfig):
        found = {str(name): _settings(str(name), value) for name, value in methods.items()}
    else:
        found = {str(methods): {"tta": str(methods)}}
    known = options("tta")
    for name, settings in found.items():
        if settings["tta"] not in known:
            hint = suggestion(settings["tta"], known) or f"; there are {', '.join(sorted(known))}"
            raise SegmillError(f"methods: {name}: there is no tta={settings['tta']}{hint}")
    return {SOURCE: {"tta": SOURCE}, **found}


def _settings(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or "tta" not in value:
        raise SegmillError(
            f"methods.{name}={value} should be settings with the method first, for example "
            f"methods.{name}={{tta: dusa, optimizer.learning_rate: 1e-5}}."
        )
    settings = {str(key): each for key, each in value.items()}
    for key in settings:
        if key != "tta" and not key.startswith(OF_A_ROW):
            raise SegmillError(
                f"methods.{name}.{key}: rows share the data, the models and their weights; only "
                f"{', '.join(f'{each}*' for each in OF_A_ROW)} may differ."
            )
    return settings


def _goes_to_row(override: str, method: str) -> bool:
    """The command line counts in every row, but methods without an optimizer have no settings."""
    key = override.partition("=")[0].lstrip("+")
    if key in {"methods", "tta"} or key.startswith("methods."):
        return False
    return method not in UNTRAINED or not key.startswith(("tta.method.", "optimizer."))
