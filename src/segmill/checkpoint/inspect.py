"""What a checkpoint is, and which variant it fits: the work behind `segmill weights inspect`."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import nn

from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import choose_rules, outline, shapes_of
from segmill.checkpoint.origin import guess_origin, training_entries
from segmill.checkpoint.read import find_weights, read_any, read_metadata
from segmill.checkpoint.report import Report, compare

Array = Shaped[np.ndarray, "..."]
# A number of classes that nobody has: where the network shows it, the file shows its own.
PROBE = 7919
# Families whose names fit best; only their variants are all tried.
FAMILIES = 3


@dataclass(frozen=True)
class Variant:
    """A model that might fit. `build(num_classes)` is called on torch's meta device."""

    name: str
    family: str
    build: Callable[[int], nn.Module]


@dataclass(frozen=True)
class Match:
    """How a variant fits, with the number of classes that the file shows.

    `keys`: whose names the file uses, as the network's `key_rules()` call it.
    """

    variant: str
    num_classes: int | None
    keys: str
    report: Report


@dataclass(frozen=True)
class Inspection:
    """What a file holds. `wrappers`: around the weights; `beside`: the other top-level entries."""

    path: Path
    origin: str
    wrappers: tuple[str, ...]
    beside: tuple[str, ...]
    training: tuple[str, ...]
    metadata: Mapping[str, str]
    arrays: int
    values: int
    best: Match | None
    equals: tuple[str, ...]


def inspect_file(path: Path, variants: Iterable[Variant]) -> Inspection:
    """Read the file and hold it against the variants."""
    tree, metadata = read_any(path), read_metadata(path)
    arrays, wrappers = find_weights(tree, path)
    best, equals = best_match(arrays, variants, hint=_variant_in(metadata) or path.name)
    return Inspection(
        path=path,
        origin=guess_origin(arrays, tree, metadata),
        wrappers=wrappers,
        beside=tuple(str(key) for key in tree if wrappers and key != wrappers[0]),
        training=training_entries(tree),
        metadata=metadata,
        arrays=len(arrays),
        values=sum(array.size for array in arrays.values()),
        best=best,
        equals=equals,
    )


def best_match(
    arrays: Mapping[str, Array], variants: Iterable[Variant], *, hint: str
) -> tuple[Match | None, tuple[str, ...]]:
    """The variant with the fewest problems, and the names of others that were found equal.

    Building a variant is what takes time. `hint` (the file's name: MMSegmentation's begin with the
    variant's) orders the search, which ends at an exact fit; before, one variant of each family is
    tried, then all of the families whose names fit.
    """
    ordered = sorted(variants, key=lambda v: -SequenceMatcher(None, v.name, hint).ratio())
    first = {variant.family: variant for variant in reversed(ordered)}
    tried: dict[str, Match] = {}
    for variant in (v for v in ordered if v in first.values()):
        tried[variant.name] = match(arrays, variant)
        if not tried[variant.name].report.problems:
            return tried[variant.name], ()
    shared = {family: _shared_names(tried[v.name].report) for family, v in first.items()}
    families = sorted(shared, key=lambda family: -shared[family])[:FAMILIES]
    for variant in ordered:
        if variant.family in families and shared[variant.family] and variant.name not in tried:
            tried[variant.name] = match(arrays, variant)
    places = {variant.name: place for place, variant in enumerate(ordered)}
    best, *rest = sorted(tried.values(), key=lambda m: (m.report.problems, places[m.variant]))
    if not _shared_names(best.report):
        return None, ()
    return best, tuple(m.variant for m in rest if m.report.problems == best.report.problems)


def match(arrays: Mapping[str, Array], variant: Variant) -> Match:
    """Hold the file against the variant, with the file's own number of classes."""
    with torch.device("meta"):
        network = variant.build(PROBE)
    keys, rules = choose_rules(network, arrays)
    renamed, shapes = apply_rules(outline(arrays), rules), shapes_of(network)
    report = compare(renamed, shapes)
    num_classes = _classes_shown(report)
    if num_classes is not None:
        # Some heads have one more class, "no object", so that PROBE + 1 appears as well.
        known = {PROBE: num_classes, PROBE + 1: num_classes + 1}
        shapes = {name: tuple(known.get(n, n) for n in shape) for name, shape in shapes.items()}
        report = compare(renamed, shapes)
    return Match(variant.name, num_classes, keys, report)


def _classes_shown(report: Report) -> int | None:
    votes = Counter(
        theirs[axis] - (ours[axis] - PROBE)
        for _, theirs, ours in report.wrong_shape
        for axis in range(min(len(theirs), len(ours)))
        if ours[axis] in (PROBE, PROBE + 1)
    )
    return votes.most_common(1)[0][0] if votes else None


def _shared_names(report: Report) -> int:
    return len(report.loaded) + len(report.wrong_shape)


def _variant_in(metadata: Mapping[str, str]) -> str | None:
    """The variant that segmill wrote into its own file."""
    if "segmill" not in metadata:
        return None
    description: Any = json.loads(metadata["segmill"])
    name = description.get("model_name") if isinstance(description, dict) else None
    return name if isinstance(name, str) else None
