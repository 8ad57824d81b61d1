"""The text of an experiment file: options first, then the keys that differ from them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def experiment_text(
    *, title: str, options: Mapping[str, str], keys: Mapping[str, Any], name: str
) -> str:
    """`options`: group -> option; `keys`: dotted key -> value."""
    lines = ["# @package _global_", *(f"# {line}" for line in title.splitlines()), "defaults:"]
    lines += [f"  - override /{group}: {option}" for group, option in options.items()]
    lines += ["  - _self_"]
    tree: dict[str, Any] = {}
    for key, value in {**keys, "experiment.name": name}.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return "\n".join([*lines, *_block(tree, 0), ""])


def _block(tree: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for key, value in tree.items():
        start = f"{'  ' * depth}{_key(key)}:"
        if isinstance(value, Mapping) and value:
            lines += [start, *_block(value, depth + 1)]
        else:
            lines.append(f"{start} {_value(value)}")
    return lines


def _key(key: Any) -> str:
    text = str(key)
    return text if text.replace("_", "").replace(".", "").isalnum() else json.dumps(text)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False)


def _number(value: float) -> str:
    """With a point, without which YAML takes 6e-05 for text."""
    mantissa, mark, exponent = repr(value).partition("e")
    if mark and "." not in mantissa:
        mantissa += ".0"
    return f"{mantissa}{mark}{exponent}"
