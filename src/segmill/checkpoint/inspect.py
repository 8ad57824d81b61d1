"""What a checkpoint is, and which variant it fits: the work behind `segmill weights inspect`."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import nn

from segmill.checkpoint.choose import outline
from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import choose_rules, shapes_of
from segmill.checkpoint.origin import guess_origin, training_entries
from segmill.checkpoint.read import find_weights, is_jittor, read_any, read_metadata
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


def inspect_file(path: Path, variants: Iterable[Variant]) -> Inspection:
    """Read the file and hold it against the variants."""
    tree, metadata = read_any(path), read_metadata(path)
    arrays, wrappers = find_weights(tree, path)
    origin = guess_origin(arrays, tree, metadata)
    return Inspection(
        path=path,
        origin=f"{origin}, saved by Jittor" if is_jittor(path) else origin,
        wrappers=wrappers,
        beside=tuple(str(key) for key in tree if wrappers and key != wrappers[0]),
        training=training_entries(tree),
        metadata=metadata,
        arrays=len(arrays),
        values=sum(array.size for array in arrays.values()),
        best=best_match(arrays, variants, hint=path.name),
    )


def best_match(
    arrays: Mapping[str, Array], variants: Iterable[Variant], *, hint: str
) -> Match | None:
    """The variant with the fewest problems, None if no variant shares a name with the file.

    Building a variant is what takes time, so the search ends at an exact fit. `hint` (the file's
    name: MMSegmentation's have the variant's words) orders it; one variant of each family comes
    first, then all variants of the families whose names fit.
    """
    ordered = sorted(variants, key=lambda v: -_alike(v.name, hint))
    first = {variant.family: variant for variant in reversed(ordered)}
    representatives = [variant for variant in ordered if first[variant.family] is variant]
    best, shared = None, dict.fromkeys(first, 0.0)

    def siblings() -> Iterator[Variant]:
        families = sorted((f for f in shared if shared[f]), key=lambda f: -shared[f])[:FAMILIES]
        for family in families:
            yield from (v for v in ordered if v.family == family and v is not first[family])

    for variant in chain(representatives, siblings()):
        found = match(arrays, variant)
        shared[variant.family] = max(shared[variant.family], _shared_part(found.report))
        if best is None or found.report.problems < best.report.problems:
            best = found
        if not found.report.problems:
            break
    return best if any(shared.values()) else None


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


def _shared_part(report: Report) -> float:
    """Of the shorter list of names, so that a deep and a shallow variant of a family agree."""
    shared = _shared_names(report)
    return shared / max(1, shared + min(len(report.missing), len(report.unused)))


def _alike(variant: str, hint: str) -> float:
    """The part of the variant's words that the hint has: `pspnet`, `r50`, `d8`."""
    words, known = re.split("[-_]", variant), set(re.split("[-_.]", hint))
    return sum(word in known for word in words) / len(words)
