"""The rows of a comparison: which methods, each with the whole configuration it runs under."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from segmill.commands.settings import TTASettings
from segmill.configuration import Invocation, build, compose, quoted
from segmill.errors import SegmillError
from segmill.options import options, suggestion
from segmill.tta.results import SOURCE

log = logging.getLogger(__name__)

UNTRAINED = (SOURCE, "bn")  # update no weights, and are what their names say
NOT_OF_THESE = ("tta.method.", "tta.batch_statistics", "optimizer")
# What may differ between rows: they share the data, the models and their weights.
OF_A_ROW = ("tta.", "optimizer.", "model.update.", "model.loss.")
OF_ALL_ROWS = ("tta.forward_mode", "tta.mixed")
# Folders and files of the run itself.
TAKEN = ("pictures", "evidence", "config.yaml", "command.txt", "commit.txt", "environment.txt")
TAKEN += ("git.patch", "report.html", "results.csv", "results.json")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One method of the comparison."""

    name: str
    config: DictConfig

    @property
    def tta(self) -> TTASettings:
        """The settings of the harness for this row; its method is built elsewhere."""
        node = {**self.config.tta, "method": None}
        return build({"_target_": f"{TTASettings.__module__}.TTASettings", **node})


def rows_of(config: DictConfig, context: Invocation) -> dict[str, Row]:
    """The methods to compare, `source` first; every row is composed and checked before any runs."""
    _refuse_contradictions([_key(each) for each in context.overrides], config.run)
    if config.tta.forward_mode == "discriminative_only":
        log.info("tta.forward_mode=discriminative_only: nothing adapts, only the source runs.")
        wanted: dict[str, Settings] = {SOURCE: {"tta": SOURCE}}
    else:
        wanted = _wanted(config)
        _refuse_unused(context.overrides, wanted)
    return {name: _row(name, each, context.overrides) for name, each in wanted.items()}


def saved_rows(folder: Path, context: Invocation) -> tuple[DictConfig, dict[str, Row]]:
    """The configuration and the rows of an interrupted run."""
    others = [each for each in context.overrides if not each.startswith("resume=")]
    if others:
        raise SegmillError(
            f"resume goes on with a comparison as it was; {', '.join(others)} would make it "
            "another one. Leave it out, or start a new run."
        )
    config = _load(folder / "config.yaml")
    if "methods" not in config:
        raise SegmillError(f"resume={folder}: this is no run folder of a segmill adapt.")
    names = [str(name) for name in config.methods]
    return config, {name: Row(name, _load(folder / name / "config.yaml")) for name in names}


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        raise SegmillError(f"resume: {path} is missing. Give the run folder of a segmill adapt.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def _row(name: str, settings: Settings, typed: Sequence[str]) -> Row:
    kept = [each for each in typed if _goes_to_row(each, settings["tta"])]
    own = [f"{key}={_written(value)}" for key, value in settings.items()]
    try:
        row = Row(name, compose("adapt", [*kept, *own]))
        _ = row.tta  # wrong values are refused now
    except SegmillError as error:
        if name == SOURCE:  # wrong for all
            raise
        raise SegmillError(f"methods: {name}: {error}") from error
    return row


def _wanted(config: DictConfig) -> dict[str, Settings]:
    """Row name -> its settings; a list of names is a row for each."""
    methods = config.methods
    if methods is None:
        methods = ListConfig([config.method_name])
    if isinstance(methods, ListConfig):
        found = {str(name): {"tta": str(name)} for name in methods}
    elif isinstance(methods, DictConfig):
        plain = OmegaConf.to_container(methods, resolve=True)
        assert isinstance(plain, dict)
        found = {str(name): _settings(str(name), value) for name, value in plain.items()}
    else:
        found = {str(methods): {"tta": str(methods)}}
    known = options("tta")
    for name, settings in found.items():
        if settings["tta"] not in known:
            hint = suggestion(settings["tta"], known) or f"; there are {', '.join(sorted(known))}"
            raise SegmillError(f"methods: {name}: there is no tta={settings['tta']}{hint}")
        if name == SOURCE and settings["tta"] != SOURCE:
            raise SegmillError(
                f"methods.{SOURCE}: this row is the model as it was trained, which all others are "
                f"compared with. Give the row with tta={settings['tta']} another name."
            )
    return {SOURCE: {"tta": SOURCE}, **found}


def _settings(name: str, value: Any) -> Settings:
    if not isinstance(value, Mapping) or not isinstance(value.get("tta"), str):
        raise SegmillError(
            f"methods.{name}={_written(value)} should be settings with the method first: "
            f"methods.{name}={{tta: dusa, optimizer.learning_rate: 1e-5}}. "
            f"'~methods.{name}' leaves the row out."
        )
    if name in TAKEN or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise SegmillError(
            f"methods: {name}: a row's results lie in a folder of its name, so it should consist "
            "of letters, digits, '_', '-' and '.', not begin with '.', and not be "
            f"{' or '.join(TAKEN)}."
        )
    settings = {str(key): each for key, each in value.items()}
    for key in settings:
        if key in OF_ALL_ROWS:
            raise SegmillError(
                f"methods.{name}.{key}: this is one setting for all rows, as they are compared "
                f"image by image. Write {key}={_written(settings[key])} beside methods."
            )
        if key != "tta" and not key.startswith(OF_A_ROW):
            raise SegmillError(
                f"methods.{name}.{key}: rows share the data, the models and their weights; only "
                f"{', '.join(f'{each}KEY' for each in OF_A_ROW)} may differ, each written in full "
                "as optimizer.learning_rate is."
            )
    return settings


def _refuse_contradictions(typed: Sequence[str], run: str | None) -> None:
    """Two words of which one would be ignored; an experiment may say the run."""
    pairs = [("tta", "methods"), ("run", "weights"), ("run", "model/discriminative")]
    for one, other in pairs:
        if one in typed and other in typed:
            raise SegmillError(
                f"{one}=... and {other}=... are both given, and only {_stronger(one, other)} would "
                "count. Leave one of them out."
            )

    if run is not None and "weights" in typed and "run" not in typed:
        raise SegmillError(
            f"The experiment has run={run}, which brings its own weights, and weights=... would "
            "not count. Add run=null, or leave it out."
        )


def _stronger(one: str, other: str) -> str:
    return other if other == "methods" else one


def _refuse_unused(typed: Sequence[str], wanted: Mapping[str, Settings]) -> None:
    for override in typed:
        key = _key(override)
        if key.startswith(NOT_OF_THESE) and not any(
            _goes_to_row(override, settings["tta"]) for settings in wanted.values()
        ):
            raise SegmillError(
                f"{override}: no row takes it; {' and '.join(UNTRAINED)} update no weights and "
                "are what their names say. Choose a method that does, or leave it out."
            )


def _goes_to_row(override: str, method: str) -> bool:
    """The command line counts in every row, but methods without an optimizer have no settings."""
    key = _key(override)
    if key in {"methods", "tta"} or key.startswith("methods."):
        return False
    return method not in UNTRAINED or not key.startswith(NOT_OF_THESE)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _written(value: Any) -> str:
    """A value as an override has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_written(each) for each in value)}]"
    return quoted(value) if isinstance(value, str) else str(value)
