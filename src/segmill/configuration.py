"""The configuration edge: compose with Hydra, then refuse everything that is wrong at once.

What Hydra accepts or explains badly is settled here before anything starts: misspelt groups,
options and keys, values that the constructors' annotations do not take, missing values, and
interpolations that lead nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segmill.commands.settings import BUILDS, KEYS
from segmill.errors import SegmillError
from segmill.inspection import keys_of, problems_in
from segmill.options import (
    config_folders,
    fits,
    fitting,
    groups,
    is_file,
    options,
    suggestion,
    target_of,
)
from segmill.paths import CONFIGS
from segmill.twins import prepare_runtime, require_twins, with_twins
from segmill.typecheck import converted, located, parameters


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What was typed."""

    verb: str
    argv: tuple[str, ...]  # without the program's name
    command: str  # the whole line, quoted for a shell
    overrides: tuple[str, ...]
    dry_run: bool


def compose(command: str, overrides: Sequence[str]) -> DictConfig:
    """configs/COMMAND.yaml with `overrides` (key=value), checked and with all problems listed.

    `model=NAME` also finds configs/model/discriminative/NAME.yaml, and `configs/` of the current
    folder adds options. `model_name` in the result is the chosen option.
    """
    problems: list[str] = []
    parsed = [each for text in overrides if (each := _parsed(text, problems)) is not None]
    chosen, values = _split(command, parsed, problems)
    base = _hydra(command, chosen, problems)
    known = [each for each in values if _key_exists(each, base, parsed, problems)]
    lines = [line for each in known for line in _lines(each, base)]
    config = _hydra(command, [*chosen, *lines], problems)
    prepare_runtime(config.get("runtime", "torch"))
    problems += problems_in(_of_runtime(config), KEYS.get(command))
    if problems:
        raise SegmillError(_paragraph(problems))
    return config


def _of_runtime(config: DictConfig) -> DictConfig:
    """What will be built: on Jittor, the twins of what the files name."""
    if config.get("runtime") != "jittor":
        return config
    # An earlier run brings its own model; the default's is not built.
    if config.get("run") is not None or config.get("resume") is not None:
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "model"])
    require_twins(config)
    return with_twins(config)


def build(node: DictConfig | Mapping[str, Any], **extra: Any) -> Any:
    """The object that `_target_` names, its parts first; `extra` are further keywords.

    Lists become the tuples, and whole numbers the floats, that the constructor's annotations ask
    for, which hydra.utils.instantiate does not do.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    assert isinstance(plain, Mapping)
    return _built({**plain, **extra})


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as a dictionary, which is what files and metadata hold."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's view of `overrides`; raises SegmillError with everything that cannot be read."""
    problems: list[str] = []
    parsed = [each for text in overrides if (each := _parsed(text, problems)) is not None]
    if problems:
        raise SegmillError(_paragraph(problems))
    return parsed


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    built = {key: _built(each) for key, each in value.items()}
    if "_target_" not in built:
        return built
    target = located(built.pop("_target_"))
    partial = built.pop("_partial_", False)
    _, hints = parameters(target)
    keywords = {key: converted(each, hints.get(key, Any)) for key, each in built.items()}
    return functools.partial(target, **keywords) if partial else target(**keywords)


def _parsed(text: str, problems: list[str]) -> Override | None:
    """One override; a value that Hydra's grammar refuses is taken as text if that reads."""
    parser = OverridesParser.create()
    key, equals, value = text.partition("=")
    for attempt in (text, f"{key}={quoted(value)}"):
        try:
            return parser.parse_overrides([attempt])[0]
        except HydraException:
            if not equals or any(mark in value for mark in "[]{}"):
                break
    expected = "lists are written [1,2], text with special characters in quotes"
    problems.append(f"{text}: this is not key=value ({expected})")
    return None


def quoted(value: str) -> str:
    """Text as one value of an override, whatever characters it has."""
    escaped = value.replace("'", r"\'")
    return f"'{escaped}'"


def _split(
    command: str, parsed: Sequence[Override], problems: list[str]
) -> tuple[list[str], list[Override]]:
    """The choices of options as Hydra wants them, and the overrides of single values."""
    known, of_command = groups(), _groups_of(command)
    chosen: list[str] = []
    values: list[Override] = []
    for each in parsed:
        group = each.key_or_group
        if group not in known or not isinstance(each.value(), str | None):
            values.append(each)
        elif group.split("/")[0] not in of_command:
            problems.append(
                f"{each.input_line}: {command} has no group {group}; its groups are "
                f"{', '.join(of_command)}"
            )
        elif each.is_delete() or each.value() is None:
            chosen.append(each.input_line or "")
        else:
            name = str(each.value())
            option = _option(group, name)
            if option is None:
                problems.append(_no_option(command, group, name))
            else:
                chosen.append(f"{each.get_key_element()}={option}")
    return chosen, values


def _groups_of(command: str) -> list[str]:
    root = OmegaConf.load(CONFIGS / f"{command}.yaml")
    assert isinstance(root, DictConfig)
    return [str(key) for each in root.get("defaults", []) if each != "_self_" for key in each]


def _option(group: str, name: str) -> str | None:
    found = options(group)
    return found.get(name, name if is_file(group, name) else None)


def _no_option(command: str, group: str, name: str) -> str:
    found = fitting(command, group)
    hint = suggestion(name, found)
    listed = "" if hint else f"; there are {', '.join(sorted(found))}"
    return f"{group}={name}: there is no such option in configs/{group}{hint}{listed}"


def _lines(override: Override, base: DictConfig) -> list[str]:
    """The override for Hydra; a mapping may bring new keys, which problems_in looks at later.

    A list takes the place of a mapping, with which Hydra would try to merge it.
    """
    line, key = override.input_line or "", override.key_or_group
    if override.is_add() or override.is_force_add() or override.is_delete():
        return [line]
    if isinstance(override.value(), dict):
        return [f"++{line}"]
    if isinstance(override.value(), list) and isinstance(OmegaConf.select(base, key), DictConfig):
        return [f"~{key}", f"+{line}"]
    return [line]


def _key_exists(
    override: Override, base: DictConfig, parsed: Sequence[Override], problems: list[str]
) -> bool:
    """Whether the override names a key that is there, or adds one with `+`."""
    key = override.key_or_group
    if override.is_force_add() or override.is_add() or key.split(".")[0] == "hydra":
        return True
    known = keys_of(base)
    if key in known:
        return True
    # A group with a misspelt option is reported already; its keys cannot be judged.
    misspelt = {each.key_or_group for each in parsed if isinstance(each.value(), str | None)} & set(
        groups()
    )
    if any(_reported(f"{group}=", problems) and key.startswith(f"{group}.") for group in misspelt):
        return False
    problems.append(_no_key(key, known))
    return False


def _reported(start: str, problems: Sequence[str]) -> bool:
    return any(problem.startswith(start) for problem in problems)


def _no_key(key: str, known: Sequence[str]) -> str:
    """Siblings first, then the same last word elsewhere, then anything that looks alike."""
    parent, _, last = key.rpartition(".")
    known = [each for each in known if not each.endswith("_")]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    siblings = [each.removeprefix(prefix) for each in known if each.rpartition(".")[0] == parent]
    same_word = [each for each in known if each.rpartition(".")[2] == last]
    hint = (
        suggestion(last, siblings, prefix=prefix)
        or (f"; did you mean {' or '.join(same_word[:3])}?" if same_word else "")
        or ("" if parent else suggestion(key, [*known, *groups()]))
    )
    place = f"in {parent}" if parent else "here"
    listed = "" if hint else f"; keys {place}: {', '.join(siblings[:20])}"
    return f"{key}: there is no such key{hint}{listed}"


def _hydra(command: str, overrides: Sequence[str], problems: list[str]) -> DictConfig:
    extra = [f"file://{folder.as_posix()}" for folder in config_folders()[1:]]
    search = [f"hydra.searchpath=[{','.join(quoted(each) for each in extra)}]"] if extra else []
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            config = hydra_compose(command, [*search, *overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise SegmillError(_paragraph([*problems, _one_line(error)])) from error
    choices = OmegaConf.select(config, "hydra.runtime.choices")
    foreign = _foreign(command, choices)
    if foreign:  # whatever else is wrong follows from it
        raise SegmillError(_paragraph([*problems, *foreign]))
    problems += _shadowed(choices)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    for group, key in (("model", "model_name"), ("tta", "method_name")):
        if group in choices and key in config:
            config[key] = str(choices[group]).rpartition("/")[2]
    OmegaConf.set_struct(config, True)
    return config


def _foreign(command: str, choices: Mapping[Any, Any]) -> list[str]:
    """Chosen options that build what only other commands take: a training set cannot adapt."""
    problems = []
    for group in BUILDS.get(command, {}):
        option = choices.get(group)
        if option is None or fits(command, group, option):
            continue
        kind, taken = target_of(group, option), fitting(command, group)
        others = [each.replace("_", " ") for each in BUILDS if kind in BUILDS[each].get(group, ())]
        if others:
            *first, last = others
            listed = f"{', '.join(first)} and {last}" if first else last
            problems.append(
                f"{group}={option} is for segmill {listed}; "
                f"{command.replace('_', ' ')} takes {', '.join(sorted(taken))}"
                f"{_part_of_that_name(group, option)}"
            )
    return problems


def _part_of_that_name(group: str, option: str) -> str:
    """`; did you mean model/discriminative=NAME?`"""
    folder, _, name = option.rpartition("/")
    part = f"{group}/{folder}"
    return f"; did you mean {part}={name}?" if folder and part in groups() else ""


def _shadowed(choices: Mapping[Any, Any]) -> list[str]:
    """Chosen options that exist in both trees: the package's would win in silence."""
    own = config_folders()[1:]
    files = [f"{str(group).partition('@')[0]}/{option}.yaml" for group, option in choices.items()]
    return [
        f"configs/{file} exists here and in the package; give yours another name"
        for file in files
        if (CONFIGS / file).is_file() and any((folder / file).is_file() for folder in own)
    ]


def _one_line(error: Exception) -> str:
    """Hydra's message without its list of search paths."""
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    text = f"{error}".partition("Config search path")[0].partition("\nAvailable options")[0]
    return " ".join(f"{text}{cause}".split())


def _paragraph(problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        end = "" if unique[0].endswith("?") else "."
        return f"{unique[0]}{end} Nothing was started."
    lines = "\n".join(f"  - {each}" for each in unique)
    return f"{len(unique)} problems, nothing was started:\n{lines}"
