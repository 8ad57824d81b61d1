r"""Key rules: from the names in a file to the names of a network.

    Prefix("module.", "")                                             # seen by all rules below
    Rename(r"backbone\.stem\.0\.(weight|bias)", r"backbone.conv1.0.\1")
    Concat(BLOCK + r"\.query\.(weight|bias)", OURS, index=0, parts=3)  # q, k, v -> one qkv
    Drop(r".*\.relative_position_index")                               # what we compute ourselves

Read top to bottom; the first rule that matches the whole key wins; a key without a rule keeps its
name. Two keys for one target, or a missing part, is an error.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.storage import CheckpointError

Array = Shaped[np.ndarray, "..."]


@dataclass(frozen=True)
class Prefix:
    """Every key that starts with `old` starts with `new` instead, before the rules below it."""

    old: str
    new: str


@dataclass(frozen=True)
class Rename:
    """The matching key becomes `replacement`; `transform` permutes axes or reorders channels."""

    pattern: str
    replacement: str
    transform: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Concat:
    """The matching key is part `index` of `parts`, stacked along axis 0 as `target`."""

    pattern: str
    target: str
    index: int
    parts: int


@dataclass(frozen=True)
class Drop:
    """The matching key is not wanted."""

    pattern: str


Rule = Prefix | Rename | Concat | Drop


def apply_rules(arrays: Mapping[str, Array], rules: Sequence[Rule]) -> dict[str, Array]:
    """The arrays under their new names, in the file's order."""
    renamed: dict[str, Array] = {}
    origin: dict[str, str] = {}
    parts: dict[str, dict[int, Array]] = {}
    counts: dict[str, int] = {}
    for key, array in arrays.items():
        name, rule = _match(key, rules)
        if isinstance(rule, Drop):
            continue
        if isinstance(rule, Concat):
            target = _target(rule.pattern, rule.target, name)
            found = parts.setdefault(target, {})
            if rule.index in found or counts.setdefault(target, rule.parts) != rule.parts:
                raise CheckpointError(f"Two keys are part {rule.index} of {target!r}: one is {key}")
            found[rule.index] = array
            continue
        if isinstance(rule, Rename):
            name = _target(rule.pattern, rule.replacement, name)
            array = array if rule.transform is None else rule.transform(array)
        if name in renamed:
            raise CheckpointError(f"Two keys become {name!r}: {origin[name]!r} and {key!r}.")
        renamed[name], origin[name] = array, key
    return renamed | _joined(parts, counts, origin)


def _match(key: str, rules: Sequence[Rule]) -> tuple[str, Rule | None]:
    """The key as the prefixes leave it, and the rule that then takes it."""
    for rule in rules:
        if isinstance(rule, Prefix):
            if key.startswith(rule.old):
                key = rule.new + key.removeprefix(rule.old)
        elif _compiled(rule.pattern).fullmatch(key):
            return key, rule
    return key, None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _target(pattern: str, replacement: str, key: str) -> str:
    match = _compiled(pattern).fullmatch(key)
    assert match is not None
    return match.expand(replacement)


def _joined(
    parts: Mapping[str, Mapping[int, Array]], counts: Mapping[str, int], origin: Mapping[str, str]
) -> dict[str, Array]:
    joined = {}
    for target, found in parts.items():
        if target in origin:
            raise CheckpointError(f"{origin[target]!r} and joined parts both become {target!r}.")
        missing = sorted(set(range(counts[target])) - set(found))
        if missing or len(found) != counts[target]:
            raise CheckpointError(
                f"{target!r} is joined from {counts[target]} keys; the file lacks part {missing}."
            )
        shapes = {array.shape[1:] for array in found.values()}
        if len(shapes) > 1 or () in {array.shape for array in found.values()}:
            raise CheckpointError(f"The parts of {target!r} do not fit together: {shapes}.")
        joined[target] = np.concatenate([found[index] for index in range(counts[target])])
    return joined
