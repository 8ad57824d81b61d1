"""Values against annotations: does a constructor take what the configuration says?

`converted` turns what YAML can say (lists, whole numbers) into what the annotation asks for
(tuples, floats) or raises `Mismatch`; `described` says the annotation in words.
"""

from __future__ import annotations

import inspect
import pydoc
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PLAIN = (str, int, float, list, tuple, Mapping, types.NoneType)  # what YAML can say
UNKNOWN = object()  # a missing or unresolvable value: reported elsewhere, fits everything


class Mismatch(Exception):  # noqa: N818  (an answer, never shown as an error of ours)
    """The value does not fit the annotation."""


def converted(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it; a node with `_target_` stands for the object it will build."""
    stands_for_object = isinstance(value, Mapping) and "_target_" in value
    built = not isinstance(value, PLAIN)
    if hint is Any or value is UNKNOWN or stands_for_object or built:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _first_fit(value, get_args(hint))
    if origin is Literal:
        return _one_of(value, get_args(hint))
    if hint in (None, types.NoneType):
        return value if value is None else _refuse()
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(value, get_args(hint))
    if isinstance(origin, type) and issubclass(origin, Collection):
        return _collection(value, origin, get_args(hint))
    if isinstance(hint, type):
        return _instance(value, hint)
    return value


def described(hint: Any) -> str:
    """`a whole number or null`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(each) for each in get_args(hint))
    if origin is Literal:
        return " or ".join(shown(each) for each in get_args(hint))
    if isinstance(origin, type) and issubclass(origin, Collection):
        return _described_collection(origin, get_args(hint))
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        types.NoneType: "null",
        None: "null",
    }
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    words = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, str):
        return f"'{value}'"
    return str(value)


def located(name: str) -> Any:
    """The class or function with this dotted name; raises ImportError when there is none."""
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise ImportError(f"{name}: {error.value}") from error
    if found is None:
        raise ImportError(f"there is no {name}")
    return found


def parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a class or function, and the resolved annotation of each.

    Annotations that name things imported for type checkers only cannot be resolved; a test keeps
    segmill's own constructors free of them.
    """
    signature = inspect.signature(target)
    annotated = target.__init__ if isinstance(target, type) else target
    try:
        hints = get_type_hints(annotated)
    except NameError:
        hints = {}
    return dict(signature.parameters), hints


def _first_fit(value: Any, hints: tuple[Any, ...]) -> Any:
    """The alternative that takes the value as it is, else the first one that can convert it."""
    fits = []
    for hint in hints:
        try:
            fits.append(converted(value, hint))
        except Mismatch:
            continue
    if not fits:
        _refuse()
    return next((fit for fit in fits if type(fit) is type(value)), fits[0])


def _one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    # By type too: `true` is not 1.
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    return _refuse()


def _mapping(value: Any, hints: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        _refuse()
    key_hint, value_hint = hints or (Any, Any)
    return {converted(k, key_hint): converted(v, value_hint) for k, v in value.items()}


def _collection(value: Any, origin: type, hints: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        _refuse()
    if origin is tuple and hints and hints[-1] is not Ellipsis:
        if len(value) != len(hints):
            _refuse()
        return tuple(converted(v, hint) for v, hint in zip(value, hints, strict=True))
    hint = hints[0] if hints else Any
    items = [converted(v, hint) for v in value]
    return items if origin is list else tuple(items)


def _instance(value: Any, hint: type) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # By name: a Protocol with attributes cannot be asked by issubclass.
    if isinstance(value, str) and hint in Path.__mro__ and hint is not object:
        return Path(value)
    if hint in (tuple, list) and isinstance(value, list | tuple):
        return hint(value)
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint in (int, float))
    return value if fits else _refuse()


def _described_collection(origin: type, hints: tuple[Any, ...]) -> str:
    if issubclass(origin, Mapping):
        return "a mapping"
    if origin is tuple and hints and hints[-1] is not Ellipsis:
        return f"a list of {len(hints)}: {', '.join(described(each) for each in hints)}"
    return f"a list, each {described(hints[0])}" if hints else "a list"


def _refuse() -> Any:
    raise Mismatch
