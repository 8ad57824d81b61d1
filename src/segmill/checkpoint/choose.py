"""Whose names a checkpoint uses, and which file a source means: no framework is needed to tell."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.keys import Prefix, Rule, apply_rules
from segmill.checkpoint.read import CheckpointError
from segmill.checkpoint.report import compare

Array = Shaped[np.ndarray, "..."]
Shapes = Mapping[str, tuple[int, ...]]
OWN = "segmill"
RUN_WEIGHTS = "model.safetensors"
PREFIX_DEPTH = 3


@runtime_checkable
class HasKeyRules(Protocol):
    """A network that says how other libraries name its weights."""

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """{origin: rules from its file's keys to this network's}."""
        ...


def choose(
    arrays: Mapping[str, Array], shapes: Shapes, key_rules: Mapping[str, Sequence[Rule]]
) -> tuple[str, tuple[Rule, ...]]:
    """The origin and the rules that leave the fewest problems in a network of these `shapes`.

    Tried are the network's own names and each origin of `key_rules`, in files as they are, without
    a prefix that most keys share (`module.`, `model.network.`), and for a backbone alone.
    """
    names_and_shapes = outline(arrays)
    origins = {OWN: (), **key_rules}
    best: tuple[int, str, tuple[Rule, ...]] | None = None
    for prefix in _prefixes(arrays, shapes):
        for origin, own_rules in origins.items():
            rules = (*prefix, *own_rules)
            try:
                problems = compare(apply_rules(names_and_shapes, rules), shapes).problems
            except CheckpointError:
                continue  # a file of another origin may well lack a part of what is joined
            if best is None or problems < best[0]:
                best = problems, origin, rules
    assert best is not None  # the network's own names, unchanged, never fail
    return best[1:]


def outline(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Zeros of the same names, types and shapes that take no memory."""
    return {n: np.broadcast_to(np.zeros((), a.dtype), a.shape) for n, a in arrays.items()}


def file_of_run(folder: Path) -> Path:
    """The weights of a finished run."""
    weights = folder / RUN_WEIGHTS
    if not weights.is_file():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".ckpt", ".pth", ".pt"))
        raise CheckpointError(
            f"{folder} has no {RUN_WEIGHTS}, which a finished run leaves. "
            + (f"Name a file: weights={folder / others[0]}" if others else "Is it a run folder?")
        )
    return weights


def _prefixes(arrays: Mapping[str, Array], shapes: Shapes) -> list[tuple[Prefix, ...]]:
    """No prefix; each dotted prefix that most keys share, removed; each with `backbone.` added."""
    counts = Counter(
        prefix
        for name in arrays
        for depth in range(1, PREFIX_DEPTH + 1)
        if (prefix := ".".join(name.split(".")[:depth])) != name
    )
    common = [prefix for prefix, count in counts.items() if 2 * count > len(arrays)]
    removed: list[tuple[Prefix, ...]] = [(), *((Prefix(f"{each}.", ""),) for each in common)]
    if not any(name.startswith("backbone.") for name in shapes):
        return removed
    return [*removed, *((*each, Prefix("", "backbone.")) for each in removed)]
