"""Look through a composed configuration for what would fail later: nothing is built here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from segmill.options import suggestion
from segmill.typecheck import UNKNOWN, Mismatch, converted, described, located, parameters, shown

# Nodes whose constructors get every argument from the configuration; the commands add arguments to
# the others (the data's protocol and seed, the optimizer's parameters).
COMPLETE = ("model", "protocol", "trainer", "logging")
HYDRA_KEYS = frozenset({"_target_", "_partial_", "_args_", "_convert_", "_recursive_"})


def keys_of(config: DictConfig) -> list[str]:
    """Every key as it is typed: `data`, `data.crop`, ..."""
    return list(_keys(config, ""))


def problems_in(config: DictConfig, root: type | None) -> list[str]:
    """Missing values, dead interpolations, unknown keys and wrong types, one sentence each."""
    problems: list[str] = []
    plain = _plain(config, "", problems)
    if root is not None:
        problems += _check_call(plain, "", root, complete=False)
    for key, node in plain.items():
        problems += _check(node, str(key), complete=key in COMPLETE)
    return problems


def _keys(node: DictConfig, path: str) -> Iterator[str]:
    for each in node:
        key: Any = each
        name = f"{path}{key}"
        yield name
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if isinstance(node[key], DictConfig):
            yield from _keys(node[key], f"{name}.")


def _plain(node: DictConfig | ListConfig, path: str, problems: list[str]) -> Any:
    """Plain containers with interpolations resolved; what cannot be had is UNKNOWN."""
    if isinstance(node, ListConfig):
        return [_value(node, index, f"{path}[{index}]", problems) for index in range(len(node))]
    prefix = f"{path}." if path else ""
    return {key: _value(node, key, f"{prefix}{key}", problems) for key in node}


def _value(node: DictConfig | ListConfig, key: Any, path: str, problems: list[str]) -> Any:
    if not OmegaConf.is_interpolation(node, key) and OmegaConf.is_missing(node, key):
        problems.append(f"{path} has no value: give it as {path}=VALUE")
        return UNKNOWN
    try:
        value = node[key]
    except InterpolationToMissingValueError:
        return UNKNOWN  # the missing value itself is reported under its own key
    except OmegaConfBaseException:
        raw = OmegaConf.to_container(node, resolve=False)
        assert isinstance(raw, dict | list)
        problems.append(f"{path}: it refers to {raw[key]}, which does not exist")
        return UNKNOWN
    if isinstance(value, DictConfig | ListConfig):
        return _plain(value, path, problems)
    return value


def _check(node: Any, path: str, *, complete: bool) -> list[str]:
    """Every `_target_` node at `path` and below against its constructor."""
    if isinstance(node, list):
        children = [(f"{path}[{index}]", each) for index, each in enumerate(node)]
    elif isinstance(node, Mapping):
        children = [(f"{path}.{key}", each) for key, each in node.items()]
    else:
        return []
    problems = []
    if isinstance(node, Mapping) and "_target_" in node:
        problems += _check_target(node, path, complete=complete)
    for name, child in children:
        problems += _check(child, name, complete=complete)
    return problems


def _check_target(node: Mapping[Any, Any], path: str, *, complete: bool) -> list[str]:
    try:
        target = located(str(node["_target_"]))
    except ImportError as error:
        return [f"{path}._target_: cannot be imported: {_first_line(error)}"]
    return _check_call(node, path, target, complete=complete and not node.get("_partial_"))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_call(node: Mapping[Any, Any], path: str, target: Any, *, complete: bool) -> list[str]:
    """The node's keys and values against the parameters of `target`."""
    expected, hints = parameters(target)
    prefix = f"{path}." if path else ""
    where = f"{target.__module__}.{target.__qualname__}"
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in expected.values())
    problems = []
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        if key not in expected:
            if not open_ended:
                problems.append(
                    f"{prefix}{key}: {where} has no such argument{suggestion(str(key), expected)}"
                )
            continue
        problems += _check_value(value, f"{prefix}{key}", hints.get(key, Any), where)
    if complete:
        problems += [
            f"{prefix}{name} is missing: {where} needs it; add it as +{prefix}{name}=VALUE"
            for name, each in expected.items()
            if each.default is each.empty and name not in node and each.kind.name != "VAR_KEYWORD"
        ]
    return problems


def _check_value(value: Any, path: str, hint: Any, where: str) -> list[str]:
    kinds = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
    if kinds and isinstance(value, Mapping) and "_target_" not in value:
        return _check_call(value, path, kinds[0], complete=True)
    try:
        converted(value, hint)
    except Mismatch:
        return [f"{path}={shown(value)}: {where} expects {described(hint)}, found {kind_of(value)}"]
    return []


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, Mapping):
        return "a mapping"
    words = {str: "text", int: "a whole number", float: "a number", list: "a list"}
    return words.get(type(value), type(value).__name__)
