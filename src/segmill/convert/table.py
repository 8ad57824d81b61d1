"""The fields of another code base's config, what became of each, and the keys that follow.

Every field gets one row; a field that nothing is known about is never passed over in silence.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from segmill.convert.expressions import Unread
from segmill.errors import SegmillError

MAPPED, SAME = "mapped", "same by default"
MOST_FIELDS = 5_000


@dataclass(frozen=True)
class Row:
    """One field. `what`: mapped, same by default, or `check`, `dropped`, `not read` and why."""

    field: str
    value: Any
    ours: str
    what: str
    group: str = ""  # the field that was spoken of, with everything in it


class Text(str):
    """Words about values, not a value."""

    def __repr__(self) -> str:
        return str(self)


class Table:
    """`ours` is our composed configuration: a value that is there already needs no key.

    `keys` are the overrides, dotted; a key that is in `ours` as a part of a list is not possible.
    """

    def __init__(self, fields: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        self.fields, self.ours = fields, ours
        self.leaves = dict(_leaves("", fields))
        self.found: dict[str, Row] = {}
        self.keys: dict[str, Any] = {}
        self.remarks: list[str] = []

    def get(self, field: str, default: Any = None) -> Any:
        """The field's value; `default` where it is absent or not read."""
        value = part_of(self.fields, field)
        return default if value is None or _unread_in(value) else value

    def has(self, field: str) -> bool:
        """Whether the source has the field, read or not."""
        return bool(self._under(field)) or part_of(self.fields, field) is not None

    def readable(self, field: str) -> bool:
        """Whether the source has the field and all of it could be read."""
        value = part_of(self.fields, field, absent=Unread("", 0, ""))
        return not _unread_in(value)

    def note(self, field: str, what: str, ours: str = "") -> None:
        """Say of the field, and of all fields in it that have no row yet, what became of it."""
        for leaf in self._under(field):
            if leaf not in self.found:
                value = self.leaves[leaf]
                if isinstance(value, Unread) and not what.startswith("dropped"):
                    self.found[leaf] = Row(leaf, value, "", f"not read: {value}")
                else:
                    self.found[leaf] = Row(leaf, value, ours, what, field)

    def put(self, field: str, key: str, value: Any, *, check: str = "") -> None:
        """The field is our `key` with `value`; `check` says what a person should look at."""
        if not self.has(field) or not self.readable(field):
            return
        self.set(key, value)
        what = MAPPED if key in self.keys else SAME
        known = part_of(self.ours, key)
        if what == SAME and not same(known, value):
            what = f"dropped: ours has {shown(known)}, and the key is in a list"
        self.note(field, f"check: {check}" if check else what, f"{key}={shown(value)}")

    def set(self, key: str, value: Any) -> None:
        """Our `key` is `value`, an override unless it is so already."""
        if same(part_of(self.ours, key), value) and known_part(self.ours, key):
            self.keys.pop(key, None)
        elif not _is_list_part(key):
            self.keys[key] = value

    def always(self, field: str, *allowed: Any) -> None:
        """What we always do; another value in the source is a difference that has no key."""
        if not self.has(field) or not self.readable(field):
            return
        value = part_of(self.fields, field)
        ok = any(same(value, each) for each in allowed)
        ours = shown(allowed[0])
        self.note(field, SAME if ok else f"dropped: here it is always {ours}", ours)

    def remark(self, text: str) -> None:
        """Say of something that the source lacks, and that no row is for, what ours does."""
        self.remarks.append(text)

    def rows(self) -> list[Row]:
        """A row for every field, in the order of the source; one for all that share their fate."""
        single = [self.found.get(leaf) or _unknown(leaf, e) for leaf, e in self.leaves.items()]
        rows = []
        for (group, _), each in groupby(single, key=lambda row: (row.group or row.field, row.what)):
            alike = list(each)
            first = alike[0]
            many = f"{len(alike)} fields"
            rows.append(replace(first, field=group, value=Text(many)) if alike[1:] else first)
        return rows

    def _under(self, field: str) -> list[str]:
        starts = (f"{field}.", f"{field}[")
        return [leaf for leaf in self.leaves if leaf == field or leaf.startswith(starts)]


def part_of(tree: Any, path: str, *, absent: Any = None) -> Any:
    """`a.b[0].c` of nested dictionaries and lists."""
    for word in path.replace("[", ".[").split("."):
        if word.startswith("[") and isinstance(tree, list | tuple):
            index = int(word[1:-1])
            tree = tree[index] if index < len(tree) else absent
        elif isinstance(tree, Mapping) and word in tree:
            tree = tree[word]
        else:
            return absent
    return tree


def known_part(tree: Any, path: str) -> bool:
    """Whether the path exists, be its value null."""
    nothing = object()
    return part_of(tree, path, absent=nothing) is not nothing


def same(a: Any, b: Any) -> bool:
    """Equal, where a tuple is as good as a list; 1 is not True."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def shown(value: Any, most: int = 60) -> str:
    """The value on one line."""
    if isinstance(value, Unread):
        return "?"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _is_list_part(key: str) -> bool:
    return "[" in key


def _unknown(leaf: str, value: Any) -> Row:
    why = "dropped: not known to this command, see what it does"
    return Row(leaf, value, "", f"not read: {value}" if isinstance(value, Unread) else why)


def _unread_in(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_unread_in, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_unread_in, value))
    return isinstance(value, Unread)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every field with its path; a list of plain values is one field."""
    for count, leaf in enumerate(_walk(path, value)):
        if count == MOST_FIELDS:
            raise SegmillError(f"This config has more than {MOST_FIELDS} fields; no real one does.")
        yield leaf


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _walk(f"{path}.{key}" if path else str(key), each)
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | Unread) for v in value):
        for index, each in enumerate(value):
            yield from _walk(f"{path}[{index}]", each)
    else:
        yield path, value
